package cgroup

import (
	"path"
	"strings"
	"testing"

	"github.com/naru-project/naru/internal/errs"
)

func TestContainerPath(t *testing.T) {
	id := strings.Repeat("ab", 32)
	for _, c := range []struct {
		systemd      bool
		parent, want string // want "" = InvalidArgument
	}{
		{false, "/kubepods/burstable/podX", "/kubepods/burstable/podX/" + id},
		{false, "kubepods/podX", "/kubepods/podX/" + id},
		{false, "", "/naru/" + id},
		{false, "/system.slice/foo", "/system.slice/foo/" + id},
		{false, "kubepods-burstable-podX.slice", ""},
		{true, "kubepods-burstable-podX.slice", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice/naru-" + id + ".scope"},
		{true, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice/naru-" + id + ".scope"},
		{true, "/kubepods/burstable/pod1-2", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/naru-" + id + ".scope"},
		{true, "", "/naru.slice/naru-" + id + ".scope"},
		{true, "/wrong.slice/kubepods-podX.slice", ""},
		{true, "kubepods--podX.slice", ""},
		{true, "-.slice", ""},
		{true, ".slice", ""},
		{true, "a-.slice", ""},
		{false, "../../..", ""},
		{false, "/", ""},
		{false, "//", ""},
		{false, "/a//b", ""},
		{false, "/a/./b", ""},
		{false, "/a/", ""},
		{false, "/system.slice/../..", ""},
		{false, "a/../../b", ""},
		{false, "/a\x00b", ""},
		{false, "/a\nb", ""},
		{false, "/a b", ""},
		{false, "/" + strings.Repeat("a", 4096), ""},
		{false, "/" + strings.Repeat("a", 256), ""},
		{false, strings.Repeat("/a", 33), ""},
		{false, "/a/cgroup.procs", ""},
		{false, "/a/tasks", ""},
		{false, "kubepods.slice:x:y:z", ""},
		{true, "kubepods.slice:x:y:z", ""},
		{true, "../kubepods.slice", ""},
		{false, "/sys/fs/cgroup/kubepods", ""},
	} {
		d := &Driver{systemd: c.systemd, defaultParent: "/naru"}
		if c.systemd {
			d.defaultParent = "naru.slice"
		}
		got, err := d.ContainerPath(c.parent, id)
		if c.want == "" {
			if !errs.Is(err, errs.InvalidArgument) {
				t.Errorf("%q systemd=%v: got %q, %v; want InvalidArgument", clip(c.parent), c.systemd, got, err)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("%q systemd=%v: got %q, %v; want %q", c.parent, c.systemd, got, err, c.want)
		}
	}
}

func TestContainerPathRefusesBadIDs(t *testing.T) {
	d := &Driver{defaultParent: "/naru"}
	for _, id := range []string{"", ".", "..", "a/b", "a\x00", "cgroup.procs", strings.Repeat("a", 129), ".hidden"} {
		if p, err := d.ContainerPath("/pod", id); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("id %q: got %q, %v", id, p, err)
		}
	}
}

// FuzzParent: whatever is accepted is a clean path strictly below the root that
// stays where it was put.
func FuzzParent(f *testing.F) {
	for _, s := range []string{"", "/", "/kubepods/burstable/podX", "kubepods-burstable-podX.slice", "../..", "a\x00", "/a//b", "-.slice", "a--b.slice", "/a.slice/a-b.slice"} {
		f.Add(s, true)
		f.Add(s, false)
	}
	f.Fuzz(func(t *testing.T, parent string, systemd bool) {
		d := &Driver{systemd: systemd, defaultParent: "/naru"}
		got, err := d.ContainerPath(parent, "c0")
		if err != nil {
			if !errs.Is(err, errs.InvalidArgument) {
				t.Fatalf("%q: class %s", parent, errs.Of(err))
			}
			return
		}
		if path.Clean(got) != got || got[0] != '/' || strings.Count(got, "/") < 2 {
			t.Fatalf("%q: %q is no clean path below the root", parent, got)
		}
		for _, c := range strings.Split(got[1:], "/") {
			if c == "" || c == "." || c == ".." || strings.ContainsAny(c, "\x00\n ") {
				t.Fatalf("%q: bad component in %q", parent, got)
			}
		}
		if systemd {
			for _, c := range strings.Split(path.Dir(got)[1:], "/") {
				if !strings.HasSuffix(c, ".slice") {
					t.Fatalf("%q: %q is no path of slices", parent, got)
				}
			}
		}
		if checkPath(got) != nil {
			t.Fatalf("%q: Create would refuse %q", parent, got)
		}
	})
}

func TestHugePageName(t *testing.T) {
	for in, want := range map[string]string{
		"hugepages-2048kB": "2MB", "hugepages-1048576kB": "1GB", "hugepages-64kB": "64KB",
		"hugepages-0kB": "", "hugepages-xkB": "", "other": "", "hugepages-16777216kB": "16GB",
	} {
		got, _ := hugePageName(in)
		if got != want {
			t.Errorf("%s: got %q, want %q", in, got, want)
		}
	}
}

func TestParseV1Options(t *testing.T) {
	for in, want := range map[string]string{
		"rw,cpu,cpuacct":          "cpu,cpuacct",
		"rw,xattr,name=systemd":   "name=systemd",
		"rw,memory":               "memory",
		"rw,net_cls,net_prio":     "net_cls,net_prio",
		"rw":                      "",
		"rw,clone_children,noexe": "",
	} {
		if _, got := parseV1Options(in); got != want {
			t.Errorf("%s: got %q, want %q", in, got, want)
		}
	}
}
