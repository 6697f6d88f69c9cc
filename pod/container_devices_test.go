package pod

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cdi"
)

const twoDevices = `cdiVersion: 0.7.0
kind: v.com/x
devices:
- name: a
  containerEdits:
    env: [A=1]
    mounts: [{hostPath: /host/a, containerPath: /data/}, {hostPath: /host/both, containerPath: /both}]
- name: b
  containerEdits:
    mounts: [{hostPath: /host/b, containerPath: /both, options: [ro]}]
    additionalGids: [44]
`

func deviceManager(t *testing.T, annotations bool) *Manager {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: specification files are root's")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "v.yaml"), []byte(twoDevices), 0o644); err != nil {
		t.Fatal(err)
	}
	m := &Manager{cdi: cdi.New([]string{dir})}
	m.live.Store(&Live{CDIAnnotations: annotations})
	return m
}

// TestCDIMounts: the mounts of devices replace those of the request on the same
// path; image volumes stay with their mounts.
func TestCDIMounts(t *testing.T) {
	m := deviceManager(t, false)
	devices, err := m.cdi.Resolve([]string{"v.com/x=a", "v.com/x=b"})
	if err != nil {
		t.Fatal(err)
	}
	w := &containerWork{
		pod: &Pod{Config: &SandboxConfig{}}, devices: devices,
		mounts:  []Mount{{ContainerPath: "/first", HostPath: "/1"}, {ContainerPath: "/data", HostPath: "/2"}, {ContainerPath: "/image", Image: "i"}},
		volumes: map[int]runtime.ImageVolume{2: {SubPath: "mine"}},
	}
	mounts, volumes := w.withDevices()
	var got []string
	for _, m := range mounts {
		got = append(got, m.HostPath+":"+m.ContainerPath)
	}
	if want := []string{"/1:/first", ":/image", "/host/a:/data/", "/host/b:/both"}; !slices.Equal(got, want) || !mounts[3].Readonly {
		t.Errorf("got %v, want %v", got, want)
	}
	if len(volumes) != 1 || volumes[1].SubPath != "mine" {
		t.Errorf("image volumes %v", volumes)
	}
	if len(w.mounts) != 3 || w.mounts[1].HostPath != "/2" {
		t.Errorf("the mounts of the request were changed: %v", w.mounts)
	}
}

// TestCDIGroups: the groups of devices are the user's, and must be in the pod's
// user namespace.
func TestCDIGroups(t *testing.T) {
	m := deviceManager(t, false)
	devices, err := m.cdi.Resolve([]string{"v.com/x=b"})
	if err != nil {
		t.Fatal(err)
	}
	for size, class := range map[uint32]errs.Class{0: -1, 45: -1, 44: errs.FailedPrecondition} {
		cfg := &SandboxConfig{}
		if size > 0 {
			cfg.GIDMap = []IDMap{{HostID: 1 << 16, Size: size}}
		}
		w := &containerWork{pod: &Pod{Config: cfg}, devices: devices, c: newContainerEntry(&Container{ID: "x", Config: &ContainerConfig{}})}
		user, oci := &User{Groups: []uint32{5}}, &specs.Spec{Process: &specs.Process{User: specs.User{AdditionalGids: []uint32{5}}}}
		err := w.applyDevices(oci, user)
		if class >= 0 {
			if !errs.Is(err, class) || !strings.Contains(err.Error(), "group 44") {
				t.Errorf("size %d: %v", size, err)
			}
			continue
		}
		if err != nil || !slices.Equal(user.Groups, []uint32{5, 44}) {
			t.Errorf("size %d: %v %v", size, user.Groups, err)
		}
	}
}

// K-03: annotations name devices only where the administrator allows it, and
// only those of CDI's own prefix.
func TestCDIAnnotationsK03(t *testing.T) {
	c := &ContainerConfig{
		CDIDevices:  []string{"v.com/x=a"},
		Annotations: map[string]string{"cdi.k8s.io/two": "v.com/x=b,v.com/x=a", "cdi.k8s.io/one": "v.com/x=c", "my.cdi.k8s.io/x": "v.com/x=d", "cdi.k8s.io": "v.com/x=e"},
		Labels:      map[string]string{"cdi.k8s.io/label": "v.com/x=f"}, ImageAnnotations: map[string]string{"cdi.k8s.io/image": "v.com/x=g"},
	}
	for allowed, want := range map[bool][]string{false: {"v.com/x=a"}, true: {"v.com/x=a", "v.com/x=c", "v.com/x=b"}} {
		got, err := deviceManager(t, allowed).cdiNames(c)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("allowed %v: got %v %v, want %v", allowed, got, err, want)
		}
	}
	for _, bad := range []string{"", "gpu", "v.com/x=../../y", "v.com/x=a;v.com/x=b"} {
		_, err := deviceManager(t, true).cdiNames(&ContainerConfig{Annotations: map[string]string{"cdi.k8s.io/x": bad}})
		if !errs.Is(err, errs.InvalidArgument) || !strings.Contains(err.Error(), `"cdi.k8s.io/x"`) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
