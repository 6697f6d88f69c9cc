package naru_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/naru-project/naru"

// goPackage is what these tests read of go list's output.
type goPackage struct {
	ImportPath   string
	Dir          string
	Doc          string
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
}

// rel is the package's folder within the module.
func (p goPackage) rel() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
}

// listPackages runs go list for both architectures' common view: linux, no cgo.
func listPackages(t *testing.T, args ...string) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Dir,Doc,Imports,TestImports,XTestImports,Deps"}, args...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %v: %v\n%s", args, err, stderr.String())
	}
	var all []goPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// folders are the parts of the tree, each with what it must not import. A
// name without a dot in its first element is a folder of this module.
var folders = map[string][]string{
	"cmd/shim":    {},
	"cmd/monitor": {"cri", "pod", "sandbox", "images"},
	"cri":         {"sandbox", "runtime", "cmd", "golang.org/x/sys", "os/exec"},
	"pod":         {"cri", "cmd", "k8s.io/cri-api", "k8s.io/cri-streaming", "google.golang.org/grpc", "os/exec"},
	"sandbox":     {"pod", "cri", "runtime", "images", "cmd", "os/exec"},
	"runtime":     {"pod", "cri", "images", "sandbox", "cmd"},
	"images":      {"pod", "cri", "runtime", "sandbox", "cmd", "os/exec"},
	"internal":    {"pod", "cri", "runtime", "sandbox", "images", "cmd"},
}

// exempt are packages with a stated reason to break an arrow, as
// "importer imported".
var exempt = map[string]string{}

func within(pkg, folder string) bool { return pkg == folder || strings.HasPrefix(pkg, folder+"/") }

// TestFolders checks that the given folders exist and hold Go code, or in the
// case of hack and docs what they are for.
func TestFolders(t *testing.T) {
	for folder := range folders {
		var found bool
		err := filepath.WalkDir(folder, func(name string, d fs.DirEntry, err error) error {
			found = found || (err == nil && strings.HasSuffix(name, ".go") && !strings.HasSuffix(name, "_test.go"))
			return err
		})
		if err != nil || !found {
			t.Errorf("%s holds no Go code (%v)", folder, err)
		}
	}
	for _, name := range []string{
		"README.md", "CHANGELOG.md", "LICENSE", "Makefile", ".golangci.yml", ".ci/run",
		"docs/architecture.md", "docs/request-paths.md", "docs/security.md", "docs/install.md", "docs/operations.md",
		"packaging/naru.service", "packaging/naru-monitor.service", "packaging/crictl.yaml",
		"hack/demo.sh", "hack/critest.sh", "hack/kubelet-smoke.sh", "hack/bench.sh", "hack/vm/test.sh",
	} {
		if _, err := os.Stat(name); err != nil {
			t.Error(err)
		}
	}
}

// TestArrows checks who imports whom, in product code and in tests.
func TestArrows(t *testing.T) {
	for _, p := range listPackages(t, "./...") {
		importer := p.rel()
		for folder, forbidden := range folders {
			if !within(importer, folder) {
				continue
			}
			imports := slices.Clone(p.Imports)
			for _, i := range append(slices.Clone(p.TestImports), p.XTestImports...) {
				if strings.HasPrefix(i, module+"/") { // other modules, the standard library too, are free in tests
					imports = append(imports, i)
				}
			}
			for _, imported := range imports {
				name := strings.TrimPrefix(imported, module+"/")
				for _, f := range forbidden {
					if own := name != imported; own == isOwn(f) && within(name, f) && exempt[importer+" "+name] == "" {
						t.Errorf("%s imports %s: %s must not know %s", importer, name, folder, f)
					}
				}
			}
		}
	}
}

// isOwn tells a folder of this module from a package of another.
func isOwn(name string) bool {
	_, ok := folders[name]
	return ok || name == "cmd"
}

// given are the packages that the project is told to build on.
var given = []string{
	"k8s.io/cri-api", "google.golang.org/grpc", "github.com/containerd/cgroups/v3", "golang.org/x/sys/unix", "k8s.io/klog/v2",
}

// TestGivenPackages checks that product code of the two programs, not only a
// test or a stray file, imports the given packages.
func TestGivenPackages(t *testing.T) {
	programs := listPackages(t, "-deps", "./cmd/shim", "./cmd/monitor")
	for _, want := range given {
		if !slices.ContainsFunc(programs, func(p goPackage) bool {
			return within(p.ImportPath, module) && slices.ContainsFunc(p.Imports, func(i string) bool { return within(i, want) })
		}) {
			t.Errorf("no package of the two programs imports %s", want)
		}
	}
}

// TestMonitorIsSmall checks that the supervising binary stays free of what
// would make it big, slow to start, or open to input from outside.
func TestMonitorIsSmall(t *testing.T) {
	reasons := map[string]string{
		"google.golang.org/grpc":     "it speaks its own small protocol",
		"google.golang.org/protobuf": "package initialisation costs memory and start-up time",
		"k8s.io":                     "package initialisation costs memory and start-up time",
		"github.com/containerd":      "decisions are the daemon's",
		"github.com/opencontainers":  "it runs plans and knows no OCI spec",
		"github.com/spf13":           "it has no command line to speak of",
		"github.com/vishvananda":     "the network is the daemon's",
		"net/http":                   "it listens to nobody but the daemon",
		"encoding/json":              "neither keeper nor worker parses JSON",
	}
	for _, p := range listPackages(t, "./cmd/monitor") {
		for _, dep := range p.Deps {
			for forbidden, why := range reasons {
				if within(dep, forbidden) {
					t.Errorf("naru-monitor depends on %s: %s", dep, why)
				}
			}
		}
	}
}

// TestPackageDocs checks that every package says what it is for.
func TestPackageDocs(t *testing.T) {
	for _, p := range listPackages(t, "./...") {
		goFiles, _ := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		onlyTests := !slices.ContainsFunc(goFiles, func(f string) bool { return !strings.HasSuffix(f, "_test.go") })
		if p.Doc == "" && !onlyTests {
			t.Errorf("package %s has no package comment", path.Join(module, p.rel()))
		}
	}
}
