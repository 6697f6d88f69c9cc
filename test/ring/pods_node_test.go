package ring

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestPodImages(t *testing.T) {
	n := StartNode(t)
	image := func(ref string) *criv1.Image {
		t.Helper()
		r, err := n.Images.ImageStatus(within(t, callTime), &criv1.ImageStatusRequest{Image: &criv1.ImageSpec{Image: ref}})
		if err != nil {
			t.Fatalf("status of image %s: %v", ref, err)
		}
		return r.Image
	}
	used := func() uint64 {
		t.Helper()
		r, err := n.Images.ImageFsInfo(within(t, callTime), &criv1.ImageFsInfoRequest{})
		if err != nil || len(r.ImageFilesystems) != 1 {
			t.Fatalf("ImageFsInfo: %v, %v", r, err)
		}
		f := r.ImageFilesystems[0]
		if f.InodesUsed.GetValue() == 0 || f.Timestamp == 0 || f.FsId.GetMountpoint() == "" {
			t.Errorf("ImageFsInfo: %v", f)
		}
		return f.UsedBytes.Value
	}
	remove := func(ref string) {
		t.Helper()
		if _, err := n.Images.RemoveImage(within(t, callTime), &criv1.RemoveImageRequest{Image: &criv1.ImageSpec{Image: ref}}); err != nil {
			t.Errorf("remove image %s: %v", ref, err)
		}
	}
	before := used()
	name := n.Image(t, ImageConfig{User: "1000:2000"}, File("big", 0o644, strings.Repeat("x", 5<<20)))
	other := n.Image(t, ImageConfig{User: "app"})
	eventually(t, 70*time.Second, "usage to grow", func() bool { return used() > before+5<<20 })
	i := image(name)
	if i == nil || i.Uid.GetValue() != 1000 || !slices.Contains(i.RepoTags, name) || i.Size < 5<<20 || !strings.HasPrefix(i.Id, "sha256:") {
		t.Fatalf("status of %s: %v", name, i)
	}
	if o := image(other); o.Username != "app" || o.Uid != nil {
		t.Errorf("user of %s: %q, %v", other, o.Username, o.Uid)
	}
	for _, ref := range []string{i.Id, strings.TrimPrefix(i.Id, "sha256:"), strings.TrimPrefix(i.Id, "sha256:")[:12]} {
		if got := image(ref); got.GetId() != i.Id {
			t.Errorf("status by %s: %v", ref, got)
		}
	}
	if got := image("ring.test/absent:1"); got != nil {
		t.Errorf("status of an absent image: %v", got)
	}
	list, err := n.Images.ListImages(within(t, callTime), &criv1.ListImagesRequest{})
	if err != nil || len(list.Images) != 3 {
		t.Errorf("list: %v, %v", list, err)
	}
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image, c.Image.UserSpecifiedImage = i.Id, name })
	if s := n.Status(t, id); s.ImageId != i.Id || s.Image.Image != i.Id || s.Image.UserSpecifiedImage != name || s.User.GetLinux().GetUid() != 1000 || s.User.GetLinux().GetGid() != 2000 {
		t.Errorf("status of the container: %v", s)
	}
	t.Run("removed while in use", func(t *testing.T) {
		remove(name)
		remove(name) // idempotent
		if got := image(name); got != nil {
			t.Errorf("it is still there: %v", got)
		}
		if out := n.Sh(t, id, "wc -c </big; id -u"); out != "5242880\n1000" {
			t.Errorf("the container sees %q", out)
		}
		n.RestartDaemon()
		if out := n.Sh(t, id, "wc -c </big"); out != "5242880" {
			t.Errorf("after a restart it sees %q", out)
		}
		n.Remove(t, id)
		eventually(t, 70*time.Second, "usage to fall", func() bool { return used() < before+5<<20 })
	})
}

// The command line, as a person uses it.
func TestPodCommandLine(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Metadata.Name = "web-of-ring" })
	id := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.Metadata.Name = "front" })
	gone := n.Run(t, pod, each(shell("exit 0"), func(c *criv1.ContainerConfig) { c.Metadata.Name = "gone" }))
	n.WaitExit(t, gone)
	has := func(t *testing.T, out string, words ...string) {
		t.Helper()
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("no %q in\n%s", w, out)
			}
		}
	}
	t.Run("ps", func(t *testing.T) {
		out, code := n.naru(t, "ps")
		has(t, out, "ring/web-of-ring", "front", pod[:12], id[:12], n.IPs(t, pod)[0], "ready", "running", Busybox)
		if code != 0 || strings.Contains(out, "gone") {
			t.Errorf("exit code %d\n%s", code, out)
		}
		out, _ = n.naru(t, "ps", "--all")
		has(t, out, "gone", "exited")
		var list []struct {
			Name       string
			Containers []struct{ ID, Name, State string }
		}
		out, _ = n.naru(t, "ps", "-a", "-o", "json")
		if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 || len(list[0].Containers) != 2 {
			t.Errorf("%v in %s", err, out)
		}
	})
	t.Run("inspect", func(t *testing.T) {
		for arg, words := range map[string][]string{id[:10]: {`"kind": "container"`, "runtimeSpec", id}, pod[:10]: {`"kind": "pod"`, "netns"}, Busybox: {`"kind": "image"`, "sha256:"}} {
			out, code := n.naru(t, "inspect", arg)
			has(t, out, words...)
			if code != 0 || !json.Valid([]byte(out)) {
				t.Errorf("exit code %d, no JSON: %s", code, out)
			}
		}
		out, code := n.naru(t, "inspect", "nobody")
		has(t, out, "nobody")
		if code == 0 {
			t.Error("exit code 0 for what is not there")
		}
	})
	t.Run("ops", func(t *testing.T) {
		out, code := n.naru(t, "ops")
		if code != 0 || strings.TrimSpace(out) != "nothing is running" {
			t.Errorf("exit code %d\n%s", code, out)
		}
		thaw := n.freezeWorker(t)
		done := make(chan error, 1)
		c := n.ContainerConfig()
		go func() {
			_, err := n.Runtime.CreateContainer(within(t, callTime), &criv1.CreateContainerRequest{PodSandboxId: pod, Config: c, SandboxConfig: n.pods[pod]})
			done <- err
		}()
		eventually(t, 10*time.Second, "the operation", func() bool { out, _ = n.naru(t, "ops"); return strings.Contains(out, "process") })
		has(t, out, "CreateContainer", "ring/web-of-ring/"+c.Metadata.Name)
		var list []map[string]any
		out, _ = n.naru(t, "ops", "-o", "json")
		if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 || list[0]["step"] != "process" && list[0]["Step"] != "process" {
			t.Errorf("%v in %s", err, out)
		}
		thaw()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Run("doctor", func(t *testing.T) {
		out, code := n.naru(t, "doctor")
		has(t, out, "overlay", " OK, ", " WARN, ", " FAIL")
		if failed := !strings.Contains(out, ", 0 FAIL"); failed != (code == 1) {
			t.Errorf("exit code %d\n%s", code, out)
		}
		out, _ = n.naru(t, "doctor", "--json")
		if !json.Valid([]byte(out)) {
			t.Errorf("no JSON: %s", out)
		}
	})
	t.Run("config check", func(t *testing.T) {
		if out, code := n.naru(t, "config", "check"); code != 0 {
			t.Errorf("exit code %d: %s", code, out)
		}
		drop := filepath.Join(filepath.Dir(n.Config), "config.d")
		if err := os.Mkdir(drop, 0o755); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(drop) }()
		if err := os.WriteFile(drop+"/10-mine.toml", []byte("[network]\npod_cdir = []\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		out, code := n.naru(t, "config", "check")
		has(t, out, "10-mine.toml", "network.pod_cdir", "network.pod_cidr", "line 2")
		if code == 0 {
			t.Error("exit code 0 for an unknown key")
		}
	})
	t.Run("image list, version, no daemon", func(t *testing.T) {
		out, _ := n.naru(t, "image", "list")
		has(t, out, Busybox)
		if out, code := n.naru(t, "version"); code != 0 || !strings.Contains(out, "naru") {
			t.Errorf("exit code %d: %s", code, out)
		}
		n.StopDaemon()
		out, code := n.naru(t, "ps")
		has(t, out, "is naru running", n.Socket)
		if code == 0 {
			t.Error("exit code 0 without a daemon")
		}
		n.StartDaemon()
	})
}
