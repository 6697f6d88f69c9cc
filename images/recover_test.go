package images

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/images/registry"
	"github.com/naru-project/naru/internal/errs"
)

// newClosed makes a store with two images that share a layer, and closes it.
func newClosed(t *testing.T) (Config, *regtest.Registry, [2]regtest.Image) {
	t.Helper()
	reg := regtest.New(t)
	base := regtest.Gzip(simple("base"))
	imgs := [2]regtest.Image{
		reg.Build("app", "v1", nil, base, regtest.Gzip(simple("one"))),
		reg.Build("app", "v2", func(i *ocispec.Image) { i.Author = "x" }, base, regtest.Gzip(simple("two"))),
	}
	cfg := testConfig(t)
	needRoot(t)
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	mustPull(t, s, reg.Host()+"/app:v1")
	mustPull(t, s, reg.Host()+"/app:v2")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return cfg, reg, imgs
}

func (c Config) record(i regtest.Image) string {
	return filepath.Join(c.Root, "images", recordFile(i.ID))
}

func TestReopen(t *testing.T) {
	cfg, reg, imgs := newClosed(t)
	s := openStore(t, cfg)
	if len(s.List()) != 2 {
		t.Fatal(len(s.List()))
	}
	i, err := s.Resolve(reg.Host() + "/app:v1")
	if err != nil || i.ID != imgs[0].ID.String() || string(i.RawConfig) != string(imgs[0].Config) || i.Size == 0 || len(i.Config.Cmd) != 1 {
		t.Errorf("%+v %v", i, err)
	}
	reg.Requests()
	mustPull(t, s, reg.Host()+"/app:v1") // nothing to transfer after a restart
	if reg.Count("GET") != 0 {
		t.Error("transferred again")
	}
	if _, err := Open(t.Context(), cfg); errs.Of(err) != errs.FailedPrecondition {
		t.Errorf("a second store on the same folder: %v", err)
	}
}

func TestDamage(t *testing.T) {
	for name, hurt := range map[string]func(t *testing.T, cfg Config, img regtest.Image){
		"truncated": func(t *testing.T, cfg Config, img regtest.Image) { must(t, os.Truncate(cfg.record(img), 100)) },
		"empty":     func(t *testing.T, cfg Config, img regtest.Image) { must(t, os.Truncate(cfg.record(img), 0)) },
		"zeros": func(t *testing.T, cfg Config, img regtest.Image) {
			must(t, os.WriteFile(cfg.record(img), make([]byte, 4096), 0o600))
		},
		"a changed digit": func(t *testing.T, cfg Config, img regtest.Image) {
			edit(t, cfg.record(img), `"dir":`, `"dir":1`)
		},
		"layer folder is gone": func(t *testing.T, cfg Config, img regtest.Image) {
			must(t, os.RemoveAll(filepath.Join(cfg.Root, "layers", fmt.Sprint(dirsOf(t, cfg, img)[1]))))
		},
		"layer folder is a file": func(t *testing.T, cfg Config, img regtest.Image) {
			p := filepath.Join(cfg.Root, "layers", fmt.Sprint(dirsOf(t, cfg, img)[1]))
			must(t, os.RemoveAll(p))
			must(t, os.WriteFile(p, nil, 0o600))
		},
		"record of another image": func(t *testing.T, cfg Config, img regtest.Image) {
			must(t, os.WriteFile(cfg.record(img), seal2(t, cfg, img, func(r *record) { r.ID = digest.FromString("x") }), 0o600))
		},
		"too few layers": func(t *testing.T, cfg Config, img regtest.Image) {
			must(t, os.WriteFile(cfg.record(img), seal2(t, cfg, img, func(r *record) { r.Layers = r.Layers[:1] }), 0o600))
		},
		"other layers": func(t *testing.T, cfg Config, img regtest.Image) {
			must(t, os.WriteFile(cfg.record(img), seal2(t, cfg, img, func(r *record) { r.Layers[1].DiffID = digest.FromString("x") }), 0o600))
		},
		"layers swapped": func(t *testing.T, cfg Config, img regtest.Image) {
			must(t, os.WriteFile(cfg.record(img), seal2(t, cfg, img, func(r *record) { r.Layers[1].Dir = r.Layers[0].Dir }), 0o600))
		},
		"config changed": func(t *testing.T, cfg Config, img regtest.Image) {
			must(t, os.WriteFile(cfg.record(img), seal2(t, cfg, img, func(r *record) { r.Config = append(r.Config, ' ') }), 0o600))
		},
		"a folder": func(t *testing.T, cfg Config, img regtest.Image) {
			must(t, os.Remove(cfg.record(img)))
			must(t, os.Mkdir(cfg.record(img), 0o700))
		},
		"a symlink": func(t *testing.T, cfg Config, img regtest.Image) {
			must(t, os.Rename(cfg.record(img), filepath.Join(cfg.Root, "elsewhere")))
			must(t, os.Symlink(filepath.Join(cfg.Root, "elsewhere"), cfg.record(img)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, reg, imgs := newClosed(t)
			hurt(t, cfg, imgs[1])
			s := openStore(t, cfg)
			if l := s.List(); len(l) != 1 || l[0].ID != imgs[0].ID.String() {
				t.Fatalf("%d images", len(l))
			}
			q, err := os.ReadDir(filepath.Join(cfg.Root, "quarantine"))
			if err != nil || len(q) != 1 {
				t.Errorf("quarantine: %v %v", q, err)
			}
			mustPull(t, s, reg.Host()+"/app:v2") // and it can be had again
			dirs, err := s.Layers(t.Context(), imgs[1].ID.String(), "c")
			if err != nil || len(dirs) != 2 {
				t.Fatal(dirs, err)
			}
			if data, err := os.ReadFile(filepath.Join(dirs[0], "two")); err != nil || string(data) != "content of two" {
				t.Error(data, err)
			}
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func edit(t testing.TB, path, old, repl string) {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Contains(data, []byte(old)) {
		t.Fatalf("%s has no %s", path, old)
	}
	must(t, os.WriteFile(path, bytes.Replace(data, []byte(old), []byte(repl), 1), 0o600))
}

func readRec(t testing.TB, cfg Config, img regtest.Image) *record {
	t.Helper()
	data, err := os.ReadFile(cfg.record(img))
	must(t, err)
	r, err := decodeRecord(data)
	must(t, err)
	return r
}

func seal2(t testing.TB, cfg Config, img regtest.Image, change func(*record)) []byte {
	t.Helper()
	r := readRec(t, cfg, img)
	change(r)
	out, err := r.encode()
	must(t, err)
	return out
}

func dirsOf(t testing.TB, cfg Config, img regtest.Image) []int {
	t.Helper()
	var out []int
	for _, l := range readRec(t, cfg, img).Layers {
		out = append(out, l.Dir)
	}
	return out
}

func TestLeftoversGo(t *testing.T) {
	cfg, _, imgs := newClosed(t)
	for _, p := range []string{"layers/tmp-123/etc", "layers/99/etc", "trash/old/x", "writable/c9/upper"} {
		must(t, os.MkdirAll(filepath.Join(cfg.Root, p), 0o700))
	}
	for _, p := range []string{"images/.tmp-1", "holds/.tmp-2"} {
		must(t, os.WriteFile(filepath.Join(cfg.Root, p), []byte("half"), 0o600))
	}
	s := openStore(t, cfg)
	waitFor(t, s.trash.Empty)
	for _, p := range []string{"layers/tmp-123", "layers/99", "trash/old", "images/.tmp-1", "holds/.tmp-2"} {
		if _, err := os.Lstat(filepath.Join(cfg.Root, p)); err == nil {
			t.Errorf("%s is still there", p)
		}
	}
	if _, err := os.Stat(filepath.Join(cfg.Root, "writable/c9")); err != nil {
		t.Error("a container's folder went before anybody said so")
	}
	if list, err := os.ReadDir(filepath.Join(cfg.Root, "layers")); err != nil || len(list) != 3 {
		t.Error(list, err)
	}
	if err := s.Sweep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(cfg.Root, "writable/c9")); err == nil {
		t.Error("an unknown container's folder stayed")
	}
	_ = imgs
}

func TestNewerAndUnknown(t *testing.T) {
	cfg, reg, imgs := newClosed(t)
	// A later release wrote the one; the other has a field that is not known here.
	edit(t, cfg.record(imgs[1]), `{"schema":1`, `{"schema":2`)
	r := readRec(t, cfg, imgs[0])
	r.rest = map[string]json.RawMessage{"later": json.RawMessage(`{"a":[1,2]}`)}
	data, err := r.encode()
	must(t, err)
	must(t, os.WriteFile(cfg.record(imgs[0]), data, 0o600))
	newer, err := os.ReadFile(cfg.record(imgs[1]))
	must(t, err)
	s := openStore(t, cfg)
	if l := s.List(); len(l) != 1 || l[0].ID != imgs[0].ID.String() {
		t.Fatalf("%d images", len(l))
	}
	reg.PutManifestAs("app", "v3", imgs[0].Manifest.MediaType, regtest.JSON(imgs[0].Doc))
	mustPull(t, s, reg.Host()+"/app:v3") // writes the record
	if got := string(readRec(t, cfg, imgs[0]).rest["later"]); got != `{"a":[1,2]}` {
		t.Errorf("the unknown field became %q", got)
	}
	if now, err := os.ReadFile(cfg.record(imgs[1])); err != nil || !bytes.Equal(now, newer) {
		t.Error("a record of a later release was touched", err)
	}
	waitFor(t, s.trash.Empty)
	if list, err := os.ReadDir(filepath.Join(cfg.Root, "layers")); err != nil || len(list) != 3 {
		t.Error("layers of a later release's image went: ", list, err)
	}
}

func TestHoldsOutliveTheProcess(t *testing.T) {
	cfg, reg, imgs := newClosed(t)
	s, err := Open(t.Context(), cfg)
	must(t, err)
	id := imgs[0].ID.String()
	dirs, err := s.Layers(t.Context(), id, "c1")
	must(t, err)
	if _, err := s.Layers(t.Context(), imgs[1].ID.String(), "c1"); err != nil { // one owner, two images
		t.Fatal(err)
	}
	must(t, s.Remove(t.Context(), id))
	must(t, s.Close())
	s, err = Open(t.Context(), cfg)
	must(t, err)
	waitFor(t, s.trash.Empty)
	if got, err := s.Layers(t.Context(), id, "c1"); err != nil || strings.Join(got, ":") != strings.Join(dirs, ":") {
		t.Errorf("after a restart: %v %v, before: %v", got, err, dirs)
	}
	for _, d := range dirs {
		if _, err := os.Stat(d); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Layers(t.Context(), id, "c2"); !errs.Is(err, errs.NotFound) {
		t.Errorf("a removed image can be used: %v", err)
	}
	must(t, s.Sweep(t.Context(), map[string]bool{"c1": true}))
	if _, err := os.Stat(dirs[0]); err != nil {
		t.Error("swept what is known: ", err)
	}
	reg.Requests()
	mustPull(t, s, reg.Host()+"/app:v1") // its layers are still here
	if n := reg.Count("GET .*/blobs/" + imgs[0].Doc.Layers[1].Digest.String()); n != 0 {
		t.Error("a held layer was transferred again")
	}
	must(t, s.Remove(t.Context(), id))
	must(t, s.Sweep(t.Context(), nil))
	waitFor(t, s.trash.Empty)
	if _, err := os.Stat(dirs[0]); err == nil {
		t.Error("the layer stayed")
	}
	must(t, s.Close())
	// A damaged hold is dropped, nothing else.
	must(t, os.WriteFile(filepath.Join(cfg.Root, "holds", "bad.json"), []byte("{"), 0o600))
	s = openStore(t, cfg)
	if len(s.List()) != 1 {
		t.Error(len(s.List()))
	}
}

func TestPrivateFolders(t *testing.T) {
	needRoot(t)
	for _, mask := range []int{0, 0o077} {
		old := unix.Umask(mask)
		cfg := testConfig(t)
		must(t, os.MkdirAll(filepath.Join(cfg.Root, "layers"), 0o777))
		must(t, os.Chmod(cfg.Root, 0o777))
		must(t, os.Chmod(filepath.Join(cfg.Root, "layers"), 0o777))
		must(t, os.Chown(cfg.Root, 65534, 65534))
		s := openStore(t, cfg)
		reg := regtest.New(t)
		reg.Build("app", "v1", nil, regtest.Gzip(regtest.Tar(regtest.File("suid", "x", 0o4755))))
		id := mustPull(t, s, reg.Host()+"/app:v1")
		dirs, err := s.Layers(t.Context(), id, "c")
		must(t, err)
		w, err := s.NewWritable(t.Context(), "c")
		must(t, err)
		upper, work := w.Upper, w.Work
		unix.Umask(old)
		for path, want := range map[string]uint32{
			cfg.Root: 0o700, cfg.Root + "/layers": 0o700, cfg.Root + "/images": 0o700, cfg.Root + "/writable": 0o700, cfg.Root + "/trash": 0o700,
			cfg.Root + "/quarantine": 0o700, cfg.Root + "/holds": 0o700, filepath.Dir(upper): 0o700, upper: 0o755, work: 0o700,
			w.Places: 0o755, w.Places + "/etc": 0o755, w.Places + "/etc/hosts": 0o644,
			dirs[0]: 0o755, dirs[0] + "/suid": 0o4755, cfg.Root + "/lock": 0o600,
		} {
			var st unix.Stat_t
			must(t, unix.Lstat(path, &st))
			if st.Mode&0o7777 != want || st.Uid != 0 {
				t.Errorf("umask %o: %s has mode %o, owner %d", mask, path, st.Mode&0o7777, st.Uid)
			}
		}
		if files, err := os.ReadDir(cfg.Root + "/images"); err == nil {
			for _, f := range files {
				if i, err := f.Info(); err != nil || i.Mode().Perm() != 0o600 {
					t.Errorf("%s has mode %v", f.Name(), i.Mode())
				}
			}
		}
	}
}

const crashEnv = "NARU_TEST_CRASH"

// crashChild pulls and removes for ever, until it is killed.
func crashChild() {
	f := strings.Split(os.Getenv(crashEnv), "|")
	s, err := Open(context.Background(), Config{Root: f[0], Live: Live{Registry: registry.Config{HostDirs: []string{}}}})
	if err != nil {
		fmt.Println("open:", err)
		os.Exit(3)
	}
	fmt.Println("ready")
	for n := 0; ; n++ {
		for i := range 3 {
			if _, err := s.Pull(context.Background(), fmt.Sprintf("%s/app:v%d", f[1], i), nil); err != nil {
				fmt.Println("pull:", err)
				os.Exit(4)
			}
		}
		_, _ = s.Resolve("x")
		if n%2 == 1 {
			_ = s.Remove(context.Background(), fmt.Sprintf("%s/app:v%d", f[1], n%3))
		}
	}
}

// Row I-07: whenever the process is killed, also between two layers, the next
// one finds whole images or none.
func TestKill(t *testing.T) {
	needRoot(t)
	reg := regtest.New(t)
	want := map[string]string{} // file to content
	for i := range 3 {
		var list []string
		for j := range 20 {
			list = append(list, fmt.Sprintf("d%d/f%d", i, j))
		}
		reg.Build("app", fmt.Sprint("v", i), func(c *ocispec.Image) { c.Author = fmt.Sprint(i) },
			regtest.Gzip(simple("base")), regtest.Gzip(simple(list...)))
		want[fmt.Sprint("v", i)] = fmt.Sprintf("d%d/f19", i)
	}
	cfg := testConfig(t)
	rnd := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	for range rounds {
		cmd := exec.Command(os.Args[0], "-test.run=xxx")
		cmd.Env = append(os.Environ(), crashEnv+"="+cfg.Root+"|"+reg.Host())
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		line := make([]byte, 5)
		if _, err := out.Read(line); err != nil || string(line) != "ready" {
			t.Fatalf("child says %q %v", line, err)
		}
		time.Sleep(time.Duration(rnd.IntN(150)) * time.Millisecond)
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()
		checkWhole(t, cfg, want)
	}
	s := openStore(t, cfg)
	for i := range 3 {
		mustPull(t, s, fmt.Sprintf("%s/app:v%d", reg.Host(), i))
	}
}

func checkWhole(t *testing.T, cfg Config, want map[string]string) {
	t.Helper()
	s, err := Open(t.Context(), cfg)
	must(t, err)
	for _, i := range s.List() {
		dirs, err := s.Layers(t.Context(), i.ID, "check")
		must(t, err)
		for _, tag := range i.RepoTags {
			f := want[tag[strings.LastIndex(tag, ":")+1:]]
			if data, err := os.ReadFile(filepath.Join(dirs[0], f)); err != nil || string(data) != "content of "+f {
				t.Errorf("%s is not whole: %q %v", tag, data, err)
			}
		}
		must(t, s.ReleaseOwner(t.Context(), "check"))
	}
	waitFor(t, s.trash.Empty)
	dirs, err := os.ReadDir(filepath.Join(cfg.Root, "layers"))
	must(t, err)
	used := map[int]bool{}
	for _, st := range s.images {
		for _, l := range st.layers {
			used[l.Dir] = true
		}
	}
	if len(dirs) != len(used) {
		t.Errorf("%d layer folders, %d in use", len(dirs), len(used))
	}
	if q, _ := os.ReadDir(filepath.Join(cfg.Root, "quarantine")); len(q) != 0 {
		t.Errorf("quarantine: %v", q)
	}
	must(t, s.Close())
}

func FuzzRecord(f *testing.F) {
	raw := regtest.Config(nil, nil)
	data, err := (&record{ID: digest.FromBytes(raw), Config: raw, Tags: []tag{{"a:b", 1}}}).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"schema":2,"body":{"layers":[{"dir":1}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRecord(data)
		if err != nil {
			return
		}
		again, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		if b, err := decodeRecord(again); err != nil || b.ID != r.ID {
			t.Error(err)
		}
	})
}

func FuzzReference(f *testing.F) {
	for _, s := range []string{"nginx", "a/b:c", "localhost:5000/x@sha256:" + strings.Repeat("a", 64), "[::1]:1/x", "../x", "u:p@h/i"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := normalize(s)
		if err != nil {
			return
		}
		if strings.Contains(n.String(), "..") && strings.Contains(n.String(), "/../") || strings.ContainsAny(n.String(), "\x00\n\r \\") {
			t.Errorf("%q became %q", s, n)
		}
		if again, err := normalize(n.String()); err != nil || again.String() != n.String() {
			t.Errorf("%q became %q, then %v %v", s, n, again, err)
		}
	})
}
