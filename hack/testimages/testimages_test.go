package main

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestTreeTar(t *testing.T) {
	tr := tree{}
	tr.file("/bin/busybox", 0o755, []byte("program"))
	tr.link("/bin/ls", "/bin/busybox")
	tr.symlink("/sbin/init", "/bin/busybox")
	tr["/bin/su"] = entry{mode: fs.ModeSetuid | 0o755, data: []byte("s")}
	tr["/tmp"] = entry{mode: fs.ModeDir | fs.ModeSticky | 0o777}
	var a, b bytes.Buffer
	if err := tr.tar(&a); err != nil {
		t.Fatal(err)
	}
	if err := tr.tar(&b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Error("the same tree gives different archives")
	}
	headers := map[string]*tar.Header{}
	var order []string
	for r := tar.NewReader(&a); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		headers[h.Name] = h
		order = append(order, h.Name)
	}
	if slices.Index(order, "bin/ls") < slices.Index(order, "bin/busybox") || slices.Index(order, "bin/") > slices.Index(order, "bin/busybox") {
		t.Errorf("order %v", order)
	}
	// A runtime applies a hard link's mode to the inode: 0 would break both names.
	if h := headers["bin/ls"]; h.Typeflag != tar.TypeLink || h.Linkname != "bin/busybox" || h.Mode != 0o755 {
		t.Errorf("hard link %+v", h)
	}
	if h := headers["sbin/init"]; h.Typeflag != tar.TypeSymlink || h.Linkname != "/bin/busybox" {
		t.Errorf("symlink %+v", h)
	}
	if headers["bin/su"].Mode != 0o4755 || headers["tmp/"].Mode != 0o1777 {
		t.Errorf("modes %o and %o", headers["bin/su"].Mode, headers["tmp/"].Mode)
	}
	tr["/lost"] = entry{hardlink: "/nowhere"}
	if err := tr.tar(io.Discard); err == nil {
		t.Error("a link to nothing is accepted")
	}
}

func TestSources(t *testing.T) {
	lines := pickLines("# deb https://mirror.example/debian x main\ndeb [signed-by=/k] https://mirror.example/debian/ bookworm main\n"+
		"deb-src https://mirror.example/debian bookworm main\ndeb https://apt.example/node nodistro main\n", true)
	want := []string{"deb [signed-by=/k] https://mirror.example/debian/ bookworm main", "deb-src [signed-by=/k] https://mirror.example/debian/ bookworm main"}
	if !slices.Equal(lines, want) {
		t.Errorf("got %q", lines)
	}
	stanzas := pickStanzas("Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n\n"+
		"Types: deb\nEnabled: no\nURIs: http://mirror.example/debian-security\n\nTypes: deb\nURIs: http://apt.example/other\n", true)
	if len(stanzas) != 1 || !strings.HasPrefix(stanzas[0], "Types: deb deb-src\nURIs: http://mirror.example/debian\n") {
		t.Errorf("got %q", stanzas)
	}
}

func TestPackages(t *testing.T) {
	got := parseDepends("libc6 (>= 2.34), libcrypt1 (>= 1:4.1.0), libssl3t64 | libssl3, iproute2, nginx-common (<< 1.1~)")
	if want := []string{"libc6", "libcrypt1", "libssl3t64", "iproute2", "nginx-common"}; !slices.Equal(got, want) {
		t.Fatalf("got %q", got)
	}
	tried := map[string]bool{}
	for _, step := range []struct{ library, want string }{
		{"libssl.so.3", "libssl3t64"}, {"libcrypt.so.1", "libcrypt1"}, {"libz.so.1", "libc6"}, {"libz.so.1", ""},
	} {
		next := nextLibraryPackage(got, tried, step.library)
		if next != step.want {
			t.Errorf("%s is looked for in %q, not %q", step.library, next, step.want)
		}
		tried[next] = true
	}
	uris := "'http://x/debian/pool/b/busybox_1.35.0-4%2bdeb12u1.dsc' busybox_1.35.0-4+deb12u1.dsc 2442 SHA256:00\n"
	if v := sourceVersion(uris); v != "1.35.0-4+deb12u1" {
		t.Errorf("version %q", v)
	}
	config := setOptions("CONFIG_TC=y\n# CONFIG_STATIC is not set\nCONFIG_STATICAL=y\n", map[string]string{"TC": "n", "STATIC": "y", "NEW": "y"})
	if want := "# CONFIG_TC is not set\nCONFIG_STATIC=y\nCONFIG_STATICAL=y\nCONFIG_NEW=y\n"; config != want {
		t.Errorf("got %q", config)
	}
}

func TestReadLinkage(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := readLinkage(self); err != nil {
		t.Error(err)
	}
	if _, err := readLinkage("testimages_test.go"); err == nil {
		t.Error("a text file is taken for an executable")
	}
}

// testImages are two images that share a layer.
func testImages(t *testing.T) []named {
	t.Helper()
	tr := tree{}
	tr.text("/a", "a")
	base, err := tr.layer()
	if err != nil {
		t.Fatal(err)
	}
	images, err := assemble(
		spec{"registry.k8s.io/x/one:1", v1.Config{Cmd: []string{"sh"}}, []v1.Layer{base}},
		spec{"localhost/two:latest", v1.Config{User: "7"}, []v1.Layer{base}})
	if err != nil {
		t.Fatal(err)
	}
	return images
}

func TestLayoutArchiveRegistry(t *testing.T) {
	images := testImages(t)
	dir := filepath.Join(t.TempDir(), "layout")
	if err := writeLayout(dir, images); err != nil {
		t.Fatal(err)
	}
	again := filepath.Join(t.TempDir(), "layout")
	if err := writeLayout(again, testImages(t)); err != nil {
		t.Fatal(err)
	}
	first, _ := os.ReadFile(filepath.Join(dir, "index.json"))
	if second, _ := os.ReadFile(filepath.Join(again, "index.json")); !bytes.Equal(first, second) {
		t.Error("the same images give different layouts")
	}
	if _, err := readLayout(dir, "localhost/three:1"); err == nil {
		t.Error("a missing reference is not noticed")
	}
	read, err := readLayout(dir, "registry.k8s.io/x/one:1")
	if err != nil || len(read) != 1 {
		t.Fatalf("%d images, %v", len(read), err)
	}
	digest, err := read[0].image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := writeArchive(&archive, read); err != nil || !bytes.Contains(archive.Bytes(), []byte("oci-layout")) {
		t.Errorf("archive of %d bytes: %v", archive.Len(), err)
	}

	srv := httptest.NewServer(registryHandler(false))
	defer srv.Close()
	if err := push(t.Context(), strings.TrimPrefix(srv.URL, "http://"), read); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{
		"/v2/": 200, "/v2/x/one/manifests/1?ns=registry.k8s.io": 200, "/v2/x/one/manifests/" + digest.String(): 200,
		"/v2/x/one/manifests/2": 404, "/v2/two/manifests/latest": 404,
	} {
		resp, err := http.Get(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d", path, resp.StatusCode)
		}
	}
}

func TestServeRegistry(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	if err := writeLayout(dir, testImages(t)); err != nil {
		t.Fatal(err)
	}
	if err := serveRegistry(t.Context(), "0.0.0.0:0", "", false, nil); err == nil {
		t.Fatal("an address that is not loopback is accepted")
	}
	ctx, cancel := context.WithCancel(t.Context())
	addrFile := filepath.Join(t.TempDir(), "addr")
	done := make(chan error, 1)
	go func() { done <- serveRegistry(ctx, "127.0.0.1:0", addrFile, false, []string{dir}) }()
	var addr []byte
	for deadline := time.Now().Add(10 * time.Second); len(addr) == 0 && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		addr, _ = os.ReadFile(addrFile)
	}
	resp, err := http.Get("http://" + strings.TrimSpace(string(addr)) + "/v2/two/manifests/latest")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("status %d", resp.StatusCode)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	if err := os.WriteFile(in, []byte("x sha256:aaaa y sha256:aaaa"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := replaceCommand(t.Context(), []string{"--from", "sha256:aaaa", "--to", "sha256:bbbb", in, out}); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(out); string(b) != "x sha256:bbbb y sha256:bbbb" {
		t.Errorf("got %q", b)
	}
	for _, args := range [][]string{{"--from", "a", "--to", "bb", in, out}, {"--from", "zzz", "--to", "yyy", in, out}} {
		if err := replaceCommand(t.Context(), args); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
}
