package admin

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

type fake struct {
	load func(ctx context.Context, r io.Reader, name string) ([]string, error)
	ops  []Operation

	reload error
}

func (f *fake) Operations() []Operation { return f.ops }
func (f *fake) Pulls() []Pull           { return []Pull{{Ref: "a/b:c", Bytes: 5, Total: 10}} }
func (f *fake) Version() Version        { return Version{Version: "1.2.3", PID: 42} }
func (f *fake) Config() (string, error) { return "version = 1\n", nil }
func (f *fake) Reload() (Reload, error) {
	return Reload{File: "/c", Changes: []Change{{Key: "k", Old: "1", New: "2"}}}, f.reload
}

func (f *fake) LoadImage(ctx context.Context, r io.Reader, name string) ([]string, error) {
	return f.load(ctx, r, name)
}

func (f *fake) ImportImage(_ context.Context, path, name string) ([]string, error) {
	return []string{path + " " + name}, nil
}

func start(t *testing.T, f *fake) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "naru") // short: a socket's path
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "a")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := New(f)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		s.Shutdown(ctx)
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = os.RemoveAll(dir)
	})
	return NewClient(path)
}

func TestLists(t *testing.T) {
	f := &fake{}
	c := start(t, f)
	if v, err := c.Operations(t.Context()); err != nil || v == nil || len(v) != 0 {
		t.Errorf("no operations: %v %v", v, err)
	}
	now := time.Now().Round(0).UTC()
	f.ops = []Operation{{ID: "x", Kind: "RunPodSandbox", Step: "network", Started: now, StepAt: now}}
	if v, err := c.Operations(t.Context()); err != nil || len(v) != 1 || v[0] != f.ops[0] {
		t.Errorf("operations: %v %v", v, err)
	}
	if v, err := c.Pulls(t.Context()); err != nil || len(v) != 1 || v[0].Total != 10 {
		t.Errorf("pulls: %v %v", v, err)
	}
	if v, err := c.Version(t.Context()); err != nil || v.Version != "1.2.3" || v.PID != 42 {
		t.Errorf("version: %v %v", v, err)
	}
	if v, err := c.Config(t.Context()); err != nil || v != "version = 1\n" {
		t.Errorf("config: %q %v", v, err)
	}
	if err := c.ask(t.Context(), http.MethodGet, "nothing", &struct{}{}); !errs.Is(err, errs.Unimplemented) {
		t.Errorf("an unknown call: %v", err)
	}
}

// TestLoad: bytes arrive whole, progress comes while the archive is still being
// sent, and the references at the end.
func TestLoad(t *testing.T) {
	pr, pw := io.Pipe()
	first := bytes.Repeat([]byte("x"), 3<<20)
	c := start(t, &fake{load: func(_ context.Context, r io.Reader, name string) ([]string, error) {
		n, err := io.Copy(io.Discard, r)
		if err != nil || n != int64(len(first))+4 {
			return nil, errs.New(errs.InvalidArgument, "%d bytes, %v", n, err)
		}
		time.Sleep(3 * progressEvery)
		return []string{"docker.io/library/" + name + ":latest"}, nil
	}})
	seen := map[string]bool{}
	go func() {
		_, _ = pw.Write(first)
	}()
	refs, err := c.Load(t.Context(), pr, "busybox", func(p Progress) {
		if p.Stage == "receive" && p.Bytes == int64(len(first)) && !seen["receive"] {
			go func() { _, _ = pw.Write([]byte("tail")); _ = pw.Close() }()
		}
		seen[p.Stage] = true
	})
	if err != nil || len(refs) != 1 || refs[0] != "docker.io/library/busybox:latest" {
		t.Errorf("%v %v", refs, err)
	}
	if !seen["receive"] || !seen["unpack"] {
		t.Errorf("stages seen: %v", seen)
	}
}

func TestLoadErrors(t *testing.T) {
	f := &fake{}
	c := start(t, f)
	f.load = func(context.Context, io.Reader, string) ([]string, error) { // gives up before the end
		return nil, errs.New(errs.ResourceExhausted, "the disk is full")
	}
	endless := io.LimitReader(zeros{}, 1<<40)
	_, err := c.Load(t.Context(), endless, "", nil)
	if !errs.Is(err, errs.ResourceExhausted) || err.Error() != "the disk is full" {
		t.Errorf("got %v", err)
	}
	for _, bad := range []string{strings.Repeat("x", 2000), "a\nb"} {
		if _, err := c.Load(t.Context(), strings.NewReader(""), bad, nil); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("name %q: %v", bad[:3], err)
		}
	}
	for _, bad := range []string{"relative", "/a/../b", "", "/a\x00"} {
		if _, err := c.Import(t.Context(), bad, "", nil); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("path %q: %v", bad, err)
		}
	}
	if refs, err := c.Import(t.Context(), "/x/y", "n", nil); err != nil || refs[0] != "/x/y n" {
		t.Errorf("%v %v", refs, err)
	}
}

// TestLoadIsCancelled: a client that goes away ends the work.
func TestLoadIsCancelled(t *testing.T) {
	ended := make(chan error, 1)
	c := start(t, &fake{load: func(ctx context.Context, r io.Reader, _ string) ([]string, error) {
		_, err := io.Copy(io.Discard, r)
		if err == nil {
			<-ctx.Done()
			err = ctx.Err()
		}
		ended <- err
		return nil, err
	}})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := c.Load(ctx, io.LimitReader(zeros{}, 1<<50), "", nil)
	if !errs.Is(err, errs.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the load ended well")
		}
	case <-time.After(5 * time.Second):
		t.Error("the work goes on")
	}
}

func TestNobodyThere(t *testing.T) {
	_, err := NewClient(filepath.Join(t.TempDir(), "none")).Version(t.Context())
	if !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), "is naru running") {
		t.Errorf("got %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// FuzzImport: whatever the body, the answer is a class, never a panic.
func FuzzImport(f *testing.F) {
	f.Add([]byte(`{"path":"/a","name":"b"}`))
	f.Add([]byte(`{"path":1}`))
	f.Add([]byte(`[`))
	s := New(&fake{})
	f.Fuzz(func(t *testing.T, b []byte) {
		w := httptest.NewRecorder()
		s.importPath(w, httptest.NewRequest(http.MethodPost, "/v1/images/import", bytes.NewReader(b)))
		if w.Code != http.StatusBadRequest && w.Code != http.StatusInternalServerError { // a recorder is not full duplex
			t.Fatalf("%q: %d", b, w.Code)
		}
	})
}

func TestFromWire(t *testing.T) {
	for c := errs.Internal; c <= errs.Unimplemented; c++ {
		if got := fromWire(toWire(errs.New(c, "x"))); !errs.Is(got, c) || got.Error() != "x" {
			t.Errorf("%s came back as %v", c, got)
		}
	}
	if got := fromWire(&wireErr{Class: "Other"}); !errs.Is(got, errs.Internal) || errors.Unwrap(got) == nil {
		t.Errorf("got %v", got)
	}
}

func TestReload(t *testing.T) {
	f := &fake{}
	c := start(t, f)
	got, err := c.Reload(t.Context())
	if err != nil || got.File != "/c" || len(got.Changes) != 1 || got.Changes[0] != (Change{"k", "1", "2"}) {
		t.Fatalf("%+v %v", got, err)
	}
	f.reload = errs.New(errs.FailedPrecondition, "root cannot change")
	if _, err := c.Reload(t.Context()); !errs.Is(err, errs.FailedPrecondition) || err.Error() != "root cannot change" {
		t.Fatal(err)
	}
}
