package sysctl

import (
	"strings"
	"testing"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
)

func TestParse(t *testing.T) {
	good := map[string]struct {
		path  string
		scope Scope
	}{
		"net.ipv4.ip_forward":            {"net/ipv4/ip_forward", Net},
		"net/ipv4/conf/eth0.1/tag":       {"net/ipv4/conf/eth0.1/tag", Net},
		"net.ipv4.conf.eth0/1.tag":       {"net/ipv4/conf/eth0.1/tag", Net},
		"kernel.shm_rmid_forced":         {"kernel/shm_rmid_forced", IPC},
		"kernel/sem":                     {"kernel/sem", IPC},
		"fs.mqueue.msg_max":              {"fs/mqueue/msg_max", IPC},
		"net.ipv4.ip_local_port_range":   {"net/ipv4/ip_local_port_range", Net},
		"net.ipv6.conf.all.disable_ipv6": {"net/ipv6/conf/all/disable_ipv6", Net},
	}
	for k, want := range good {
		p, s, err := Parse(k)
		if err != nil || p != want.path || s != want.scope {
			t.Errorf("Parse(%q) = %q, %v, %v", k, p, s, err)
		}
	}
	for _, k := range []string{
		"", "net", "net.", "kernel.hostname", "kernel.core_pattern", "vm.swappiness", "kernel.shmmax.x",
		"net/../kernel/core_pattern", "net.ipv4....kernel", "net/../../etc/passwd", "/net/ipv4", "fs.mqueue", "kernel.msg_next_id",
		"net.ipv4\n.x", "net.ipv4.\x00", "net. x", strings.Repeat("net.", 200), "kernel.sem.", "fs/mqueue/../file-max", "user.max_net_namespaces",
	} {
		if p, _, err := Parse(k); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("Parse(%q) = %q, %v; want InvalidArgument", k, p, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"net.ipv4.ip_forward", "net/../x", "kernel.sem", "fs.mqueue.a", "net/ipv4/conf/a.b/x", "net.a/../b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, key string) {
		path, scope, err := Parse(key)
		if err != nil {
			if !errs.Is(err, errs.InvalidArgument) {
				t.Fatalf("class of %v", err)
			}
			return
		}
		for _, p := range strings.Split(path, "/") {
			if p == "" || p == "." || p == ".." {
				t.Fatalf("%q gave %q", key, path)
			}
		}
		ok := scope == Net && strings.HasPrefix(path, "net/") ||
			scope == IPC && (strings.HasPrefix(path, "kernel/") || strings.HasPrefix(path, "fs/mqueue/"))
		if !ok {
			t.Fatalf("%q gave %q in scope %d", key, path, scope)
		}
	})
}

func TestValueMapsPingGroups(t *testing.T) {
	m := []namespaces.IDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}
	for in, want := range map[string]string{"0 0": "100000 100000", "5\t65535": "100005 165535", "1 0": "1 0"} {
		if got, err := Value(pingGroups, in, m); err != nil || got != want {
			t.Errorf("Value(%q) = %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"0 65536", "0", "a b", "0 0 0", "0 4294967296", "-1 5"} {
		if got, err := Value(pingGroups, in, m); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("Value(%q) = %q, %v", in, got, err)
		}
	}
	if got, err := Value(pingGroups, "0 2147483647", nil); err != nil || got != "0 2147483647" {
		t.Errorf("without map: %q, %v", got, err)
	}
	if _, err := Value("net.ipv4.tcp_x", "1\n2", nil); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("newline: %v", err)
	}
}
