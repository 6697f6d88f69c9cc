package pod_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"testing"

	"github.com/naru-project/naru/pod"
	"github.com/naru-project/naru/pod/podtest"
	"github.com/naru-project/naru/pod/store"
)

// damage writes data in place of a record (kind 0..2), or as the content of
// one with a right checksum (3..5), where ID stands for the pod's or the
// container's id.
func (r *rig) damage(kind uint8, podID, ctrID string, data []byte) {
	r.Helper()
	folder := []string{"pods", "containers", "specs"}[kind%3]
	id := podID
	if kind%3 > 0 {
		id = ctrID
	}
	if kind%6 >= 3 {
		data = bytes.ReplaceAll(data, []byte(`"pod_id":"ID"`), []byte(`"pod_id":"`+podID+`"`))
		data = bytes.ReplaceAll(data, []byte(`"ID"`), []byte(`"`+id+`"`))
		v := rawRecord(data)
		if b, err := store.Encode(1, &v, nil); err == nil {
			data = b
		}
	}
	if err := os.WriteFile(filepath.Join(r.dir, folder, id+".json"), data, 0o600); err != nil {
		r.Fatal(err)
	}
}

type rawRecord []byte

func (r *rawRecord) MarshalJSON() ([]byte, error) { return *r, nil }

// node fills a rig with pods of two containers each.
func node(tb testing.TB, pods int) *rig {
	r := newRig(tb)
	for i := range pods {
		cfg := podtest.SandboxConfig(fmt.Sprint("pod-", i))
		cfg.Labels = map[string]string{"io.kubernetes.pod.name": cfg.Metadata.Name, "io.kubernetes.pod.uid": cfg.Metadata.UID}
		p, err := r.m.RunSandbox(r.ctx(), cfg)
		if err != nil {
			tb.Fatal(err)
		}
		for _, name := range []string{"app", "side"} {
			r.running(p, name, "PATH=/usr/bin", "HOME=/root")
		}
	}
	return r
}

func BenchmarkListContainers(b *testing.B) {
	r := node(b, 500)
	defer func() { r.stop() }()
	for name, f := range map[string]pod.Filter{
		"all 1000": {}, "one by id": {ID: r.m.Containers(pod.Filter{})[500].ID}, "of a pod": {PodID: r.m.Sandboxes(pod.Filter{})[250].ID},
		"running": {State: string(pod.StateRunning)},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if len(r.m.Containers(f)) == 0 {
					b.Fatal("none")
				}
			}
		})
	}
}

func BenchmarkPodLife(b *testing.B) {
	r := newRig(b)
	defer func() { r.stop() }()
	b.ReportAllocs()
	for b.Loop() {
		p := r.pod("web")
		r.running(p, "app")
		r.removePod(p)
	}
}

func BenchmarkRecover(b *testing.B) {
	r := node(b, 500)
	for b.Loop() {
		r.restart()
	}
	r.stop()
}

// A thousand pods must cost little: this is a budget, in bytes of heap.
func TestMemoryOfAPod(t *testing.T) {
	r := node(t, 300)
	defer func() { r.stop() }()
	const pods = 1000
	var before, after goruntime.MemStats
	goruntime.GC()
	goruntime.ReadMemStats(&before)
	for i := range pods {
		p := r.pod(fmt.Sprint("more-", i))
		r.running(p, "app", "A=b")
	}
	goruntime.GC()
	goruntime.ReadMemStats(&after)
	each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / pods
	t.Logf("%d bytes of heap for a pod with one container, the fakes' share included", each)
	if each > 16<<10 {
		t.Errorf("a pod with one container takes %d bytes", each)
	}
}
