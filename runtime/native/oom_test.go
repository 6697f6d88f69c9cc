package native

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
)

// A child that the OOM killer ended is reported as that, with the limit.
func TestOOMKilledChildIsExplained(t *testing.T) {
	r := newRing(t)
	c := r.container("sh", "-c", "read x; head -c 100000000 /dev/zero | busybox tail")
	c.Resources, c.Stdin = runtime.Resources{Memory: 8 << 20, MemorySwap: 8 << 20}, true
	r.run(c)
	g, err := r.cfg.Cgroups.Open(c.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	k := &creation{x: r.Executor, c: c, group: g}
	died := errs.New(errs.Internal, "the first process died before it was ready: %w", io.EOF)
	if err := k.explain(died); err != died {
		t.Errorf("without an OOM kill: %v", err)
	}
	f, err := r.cfg.Monitor.Files(t.Context(), c.ID)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = f.Stdin.WriteString("\n")
	f.Close()
	_ = r.exit(c)
	got := k.explain(died)
	if !errs.Is(got, errs.FailedPrecondition) || !errors.Is(got, io.EOF) || !strings.Contains(got.Error(), "OOM killer") || !strings.Contains(got.Error(), "memory limit of 8Mi") {
		t.Errorf("after an OOM kill: %v", got)
	}
	c.Resources.Memory = 0
	if got := k.explain(died); !strings.Contains(got.Error(), "no memory limit of its own") {
		t.Errorf("without a limit: %v", got)
	}
	if err := (&creation{x: r.Executor, c: c}).explain(died); err != died {
		t.Errorf("before there is a cgroup: %v", err)
	}
}

// So does the create itself: here the pod's limit leaves no room for a process.
func TestCreateSaysOOM(t *testing.T) {
	r := newRing(t)
	if err := r.EnsurePodCgroup(t.Context(), r.parent); err != nil {
		t.Fatal(err)
	}
	file := "/sys/fs/cgroup/memory" + r.parent + "/memory.limit_in_bytes"
	if r.cfg.Cgroups.Mode() == cgroup.ModeV2 {
		file = "/sys/fs/cgroup" + r.parent + "/memory.max"
	}
	if err := os.WriteFile(file, []byte("16384"), 0); err != nil {
		t.Fatal(err)
	}
	err := r.create(r.container("true"))
	if !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "OOM killer") || !strings.Contains(err.Error(), "that of the pod") {
		t.Errorf("create in a pod without memory: %v", err)
	}
}

func TestByteSize(t *testing.T) {
	for n, want := range map[int64]string{1 << 30: "1Gi", 6 << 20: "6Mi", 1536 << 10: "1536Ki", 1000: "1000 bytes", 1<<20 + 1: "1048577 bytes"} {
		if got := byteSize(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}
