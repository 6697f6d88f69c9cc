package ring

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func cdi(names ...string) func(*criv1.ContainerConfig) {
	return func(c *criv1.ContainerConfig) {
		for _, n := range names {
			c.CDIDevices = append(c.CDIDevices, &criv1.CDIDevice{Name: n})
		}
	}
}

// cdiSpec describes two devices: one with all that a device can bring, and one
// whose hook fails.
func cdiSpec(dir string) string {
	return fmt.Sprintf(`cdiVersion: 0.7.0
kind: vendor.example/card
containerEdits:
  env: [CARD=general]
devices:
- name: full
  containerEdits:
    env: [CARD=full, DRIVER=/driver]
    deviceNodes:
    - {path: /dev/cards/card0, type: c, major: 10, minor: 229, fileMode: 438, permissions: r}
    - {path: /dev/hidden, hostPath: /dev/kmsg, fileMode: 438, permissions: none}
    mounts:
    - {hostPath: %[1]s/driver, containerPath: /driver, options: [ro, nosuid, nodev, rbind, rprivate]}
    - {hostPath: %[1]s/driver/lib.so, containerPath: /usr/lib/lib.so, options: [ro, rbind]}
    additionalGids: [4242]
    hooks:
    - {hookName: createContainer, path: %[1]s/hook, args: [hook, /driver/lib.so, /etc/ld.so.cache]}
- name: absent
  containerEdits:
    mounts: [{hostPath: /no/such/driver, containerPath: /driver}]
- name: failing
  containerEdits:
    hooks:
    - {hookName: createContainer, path: /bin/false}
`, dir)
}

// linkHook does what the hooks of GPU vendors do: it finds the container's root
// by state and bundle, and makes files in it.
const linkHook = `#!/bin/sh
set -e
state=$(cat)
bundle=${state##*\"bundle\":\"}; bundle=${bundle%%\"*}
config=$(cat $bundle/config.json)
root=${config##*\"root\":\{\"path\":\"}; root=${root%%\"*}
[ -e $root$1 ] # the mounts are there
ln -s $1 $root/etc/linked
echo cached >$root$2
`

func TestCDI(t *testing.T) {
	dirs := t.TempDir()
	first, second := filepath.Join(dirs, "etc"), filepath.Join(dirs, "run") // the second comes later
	n := StartNode(t, WithConfig(fmt.Sprintf("[cdi]\nspec_dirs = [%q, %q]", first, second)))
	if err := os.Chmod(n.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	host := n.HostDir(t)
	put := func(path, text string, mode os.FileMode) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	pod := n.Pod(t, nil)
	_, err := n.TryContainer(t, pod, cdi("vendor.example/card=full"))
	wantError(t, err, codes.FailedPrecondition, `"vendor.example/card=full"`, first, second)
	put(host+"/driver/lib.so", "code\n", 0o644)
	put(host+"/hook", linkHook, 0o755)
	put(second+"/card.yaml", cdiSpec(host), 0o644)
	put(second+"/broken.yaml", "not: [a specification", 0o644)
	check := func(t *testing.T, id string) {
		t.Helper()
		out := n.Sh(t, id, `echo $CARD $DRIVER $MINE; cat /driver/lib.so /usr/lib/lib.so /etc/linked /etc/ld.so.cache; ls -l /dev/cards/card0 | cut -c 1-10; : </dev/cards/card0 && id -G`)
		if want := "full /driver 1\ncode\ncode\ncode\ncached\ncrw-rw-rw-\n"; !strings.HasPrefix(out, want) || !slices.Contains(strings.Fields(out), "4242") {
			t.Errorf("the container sees %q, want %q and group 4242", out, want)
		}
		n.fails(t, id, "echo x >/dev/cards/card0", "not permitted")
		n.fails(t, id, "head -c 1 </dev/hidden", "not permitted")
		n.fails(t, id, "echo x >/driver/new", "Read-only")
	}
	full := each(cdi("vendor.example/card=full"), func(c *criv1.ContainerConfig) {
		c.Envs = []*criv1.KeyValue{{Key: "CARD", Value: []byte("mine")}, {Key: "MINE", Value: []byte("1")}}
	}, mounts(Volume(host, "/driver"), Volume(host, "/data")))
	id := n.Run(t, pod, full)
	t.Run("everything", func(t *testing.T) {
		check(t, id)
		s := n.Status(t, id)
		if len(s.Mounts) != 2 || !slices.Contains(s.User.GetLinux().GetSupplementalGroups(), 4242) {
			t.Errorf("the status says mounts %v, user %v", s.Mounts, s.User)
		}
	})
	t.Run("user namespace", func(t *testing.T) {
		ids := []*criv1.IDMapping{{HostId: 300000, ContainerId: 0, Length: 65536}}
		pod := n.Pod(t, namespaces(func(o *criv1.NamespaceOption) {
			o.UsernsOptions = &criv1.UserNamespace{Mode: criv1.NamespaceMode_POD, Uids: ids, Gids: ids}
		}))
		for _, d := range []string{dirs, n.RunDir} { // as /run/naru is below a folder that all may enter
			if err := os.Chmod(d, 0o711); err != nil {
				t.Fatal(err)
			}
		}
		check(t, n.Run(t, pod, full))
	})
	t.Run("shared pid namespace", func(t *testing.T) {
		pod := n.Pod(t, namespaces(func(o *criv1.NamespaceOption) { o.Pid = criv1.NamespaceMode_POD }))
		check(t, n.Run(t, pod, full))
	})
	t.Run("refused", func(t *testing.T) {
		_, err := n.TryContainer(t, pod, cdi("vendor.example/card=failing"))
		wantError(t, err, codes.FailedPrecondition, "/bin/false", "code 1")
		_, err = n.TryContainer(t, pod, cdi("vendor.example/card=absent"))
		wantError(t, err, codes.FailedPrecondition, "/no/such/driver does not exist", "/driver")
		_, err = n.TryContainer(t, pod, cdi("vendor.example/card=other"))
		wantError(t, err, codes.FailedPrecondition, `"vendor.example/card=other"`, "broken.yaml")
		_, err = n.TryContainer(t, pod, cdi("/dev/zero"))
		wantError(t, err, codes.InvalidArgument, "vendor.com/class=name")
		list, err := n.Runtime.ListContainers(within(t, callTime), &criv1.ListContainersRequest{Filter: &criv1.ContainerFilter{PodSandboxId: pod}})
		if err != nil || len(list.Containers) != 1 {
			t.Errorf("%v: containers %v are left of failed creates", err, list.GetContainers())
		}
	})
	// K-02, K-03: neither image nor annotations name devices, and links of the
	// image lead a device's mounts nowhere else.
	t.Run("hostile image K-02 K-03", func(t *testing.T) {
		outside := n.HostDir(t)
		image := n.Image(t, ImageConfig{Labels: map[string]string{"cdi.k8s.io/x": "vendor.example/card=full"}, Env: []string{"LD_PRELOAD=/evil.so"}},
			Dir("bin"), File("bin/true", 0o755, "#!/no"), Dir("usr"), Symlink("usr/lib", "../../../../../.."+outside), Symlink("driver", outside), Dir("etc"))
		create := func(c *criv1.ContainerConfig) {
			c.Image.Image, c.Command = image, []string{"/bin/true"}
			c.Annotations = map[string]string{"cdi.k8s.io/x": "vendor.example/card=failing"}
		}
		if _, err := n.TryContainer(t, pod, create); err != nil {
			t.Errorf("an annotation is followed: %v", err)
		}
		if _, err := n.TryContainer(t, pod, each(create, cdi("vendor.example/card=full"))); err != nil {
			wantError(t, err, codes.FailedPrecondition) // a mount point through such links, or none
		}
		if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
			t.Errorf("%v: %v was made on the host", err, left)
		}
	})
	t.Run("restart", func(t *testing.T) {
		created := n.Container(t, pod, full)
		if err := os.RemoveAll(second); err != nil { // a running container does not need it
			t.Fatal(err)
		}
		n.KillDaemon()
		n.StartDaemon()
		check(t, id)
		n.Start(t, created)
		check(t, created)
		_, err := n.TryContainer(t, pod, cdi("vendor.example/card=full"))
		wantError(t, err, codes.FailedPrecondition, "card=full")
	})
}

// TestCDIAnnotations: with the switch on, the container's annotations count;
// those of the image and the pod never do.
func TestCDIAnnotations(t *testing.T) {
	dir := t.TempDir()
	n := StartNode(t, WithConfig(fmt.Sprintf("[cdi]\nspec_dirs = [%q]\nannotations = true", dir)))
	if err := os.WriteFile(dir+"/v.json", []byte(`{"cdiVersion":"0.6.0","kind":"v.com/x","devices":[{"name":"d","containerEdits":{"env":["CDI=yes"]}}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Annotations = map[string]string{"cdi.k8s.io/x": "v.com/x=none"} })
	id := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.Annotations = map[string]string{"cdi.k8s.io/x": "v.com/x=d"} })
	if out := n.Sh(t, id, "echo $CDI"); out != "yes" {
		t.Errorf("got %q", out)
	}
}
