package spec

import (
	"slices"
	"strings"

	"github.com/naru-project/naru/internal/errs"
)

// Limits on sysctls.
const (
	maxSysctls     = 256
	maxSysctlName  = 256
	maxSysctlValue = 1024
)

// ipcSysctls belong to an IPC namespace (namespaces(7)), with fs.mqueue.*.
var ipcSysctls = []string{
	"kernel/auto_msgmni", "kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/sem",
	"kernel/shm_rmid_forced", "kernel/shmall", "kernel/shmmax", "kernel/shmmni",
}

// netSysctls are the trees that have a copy in every network namespace. Of
// net.core only some files have; the others are the host's.
var (
	netSysctls = []string{
		"net/ipv4/", "net/ipv6/", "net/unix/", "net/netfilter/", "net/mptcp/", "net/sctp/", "net/mpls/", "net/smc/", "net/bridge/",
	}
	netCoreSysctls = []string{"net/core/optmem_max", "net/core/somaxconn", "net/core/txrehash"}
)

// ValidateSysctls checks a pod's sysctls: only keys that belong to a namespace
// which the pod has for itself, and values that hold nothing but a value. A UTS
// namespace is private exactly when the network namespace is.
func ValidateSysctls(m map[string]string, netPrivate, ipcPrivate, userns bool) error {
	if len(m) > maxSysctls {
		return errs.New(errs.InvalidArgument, "sysctls: more than %d", maxSysctls)
	}
	seen := map[string]bool{}
	for name, value := range m {
		p, err := SysctlPath(name)
		if err != nil {
			return err
		}
		if seen[p] {
			return errs.New(errs.InvalidArgument, "sysctl %s: given twice", clip(name))
		}
		seen[p] = true
		of, private := sysctlNamespace(p, netPrivate, ipcPrivate, userns)
		switch {
		case of == "":
			return errs.New(errs.InvalidArgument, "sysctl %s: does not belong to a namespace", clip(name))
		case !private:
			return errs.New(errs.InvalidArgument, "sysctl %s: the pod has no %s namespace of its own", clip(name), of)
		case !sysctlValue(value):
			return errs.New(errs.InvalidArgument, "sysctl %s: the value has characters that no value has, or is too long", clip(name))
		}
	}
	return nil
}

// sysctlNamespace tells the kind of namespace that a sysctl belongs to, and
// whether the pod has its own.
func sysctlNamespace(p string, net, ipc, user bool) (kind string, private bool) {
	prefix := func(pre string) bool { return strings.HasPrefix(p, pre) }
	switch {
	case slices.Contains(ipcSysctls, p) || prefix("fs/mqueue/"):
		return "IPC", ipc
	case slices.ContainsFunc(netSysctls, prefix) || slices.Contains(netCoreSysctls, p) || prefix("net/core/xfrm_"):
		return "network", net
	case p == "kernel/domainname":
		return "UTS", net
	case prefix("user/max_"):
		return "user", user
	}
	return "", false
}

// SysctlPath gives a sysctl's path below /proc/sys. As in sysctl(8), the first
// separator decides: with dots first, a slash stands for a dot in a name
// (net.ipv4.conf.eth0/100.forwarding); with slashes first everything is itself.
func SysctlPath(name string) (string, error) {
	bad := errs.New(errs.InvalidArgument, "sysctl %q: not a sysctl name", clip(name))
	if len(name) > maxSysctlName || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789_-./") != "" {
		return "", bad
	}
	p := name
	if i := strings.IndexAny(name, "./"); i < 0 {
		return "", bad
	} else if name[i] == '.' {
		p = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, name)
	}
	for part := range strings.SplitSeq(p, "/") {
		if part == "" || part[0] == '.' || part[len(part)-1] == '.' || strings.Contains(part, "..") {
			return "", bad
		}
	}
	return p, nil
}

// sysctlValue accepts numbers, lists and words. No line break, and none of the
// signs by which other tools were made to set a second sysctl (CVE-2022-0811).
func sysctlValue(v string) bool {
	if v == "" || len(v) > maxSysctlValue {
		return false
	}
	for i := range len(v) {
		switch c := v[i]; {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', strings.IndexByte(" \t,.:_-/", c) >= 0:
		default:
			return false
		}
	}
	return true
}
