package seccomp

import (
	"slices"

	moby "github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Default gives the RuntimeDefault profile for a container that has the given
// capabilities (its bounding set, "CAP_" names) on a machine of the given
// GOARCH. It is the well-known list of moby, made tighter:
//
//   - socket(2): no AF_ALG, AF_VSOCK and AF_RXRPC at all (kernel surface, and
//     vsock reaches the hypervisor past the network namespace); no AF_KEY,
//     AF_XDP and NETLINK_XFRM without CAP_NET_ADMIN.
//   - socketcall(2) of 32-bit ABIs cannot make sockets: its arguments cannot
//     be seen, so it would open all of the above. 32-bit programs use the
//     direct system calls (Linux 4.3) or a profile of their own.
//   - x32 is not listed: those numbers answer ENOSYS.
//
// What is denied answers EPERM, clone3 without CAP_SYS_ADMIN ENOSYS (so that
// libc falls back to clone, whose flags can be seen), and what is newer than
// the list ENOSYS.
//
// Rules use each argument once per rule, so that other OCI runtimes, which
// read a repeated argument as alternatives, understand the profile alike.
func Default(caps []string, arch string) *specs.LinuxSeccomp {
	base := moby.DefaultProfile()
	p := &specs.LinuxSeccomp{
		DefaultAction:   specs.ActErrno,
		DefaultErrnoRet: new(uint(unix.EPERM)),
		Architectures:   defaultArchitectures[arch],
	}
	e := environment{caps: caps, arch: arch, kernel: kernelRelease()}
	for _, s := range base.Syscalls {
		if !e.allows(s.Includes, s.Excludes) {
			continue
		}
		r := s.LinuxSyscall
		if slices.Contains(r.Names, "socket") {
			continue // replaced below
		}
		r.Names = slices.DeleteFunc(slices.Clone(r.Names), func(n string) bool { return n == "socketcall" })
		p.Syscalls = append(p.Syscalls, r)
	}
	p.Syscalls = append(p.Syscalls, sockets(slices.Contains(caps, "CAP_NET_ADMIN"))...)
	return p
}

var defaultArchitectures = map[string][]specs.Arch{
	"amd64": {specs.ArchX86_64, specs.ArchX86},
	"arm64": {specs.ArchAARCH64, specs.ArchARM},
}

// lastFamily is the highest address family that containers may ask for, AF_MCTP.
const lastFamily = unix.AF_MCTP

// sockets are the rules for making sockets.
func sockets(netAdmin bool) []specs.LinuxSyscall {
	closed := []uint64{unix.AF_ALG, unix.AF_VSOCK, unix.AF_RXRPC}
	if !netAdmin {
		closed = append(closed, unix.AF_KEY, unix.AF_XDP, unix.AF_NETLINK)
	}
	first := slices.Min(closed)
	rules := []specs.LinuxSyscall{
		allow("socketcall", specs.LinuxSeccompArg{Index: 0, Value: 1, Op: specs.OpNotEqual}), // SYS_SOCKET
		allow("socket", specs.LinuxSeccompArg{Index: 0, Value: first, Op: specs.OpLessThan}),
	}
	for f := first; f <= lastFamily; f++ {
		if !slices.Contains(closed, f) {
			rules = append(rules, allow("socket", specs.LinuxSeccompArg{Index: 0, Value: f, Op: specs.OpEqualTo}))
		}
	}
	if !netAdmin {
		rules = append(rules, allow("socket",
			specs.LinuxSeccompArg{Index: 0, Value: unix.AF_NETLINK, Op: specs.OpEqualTo},
			specs.LinuxSeccompArg{Index: 2, Value: unix.NETLINK_XFRM, Op: specs.OpNotEqual}))
	}
	return rules
}

func allow(name string, args ...specs.LinuxSeccompArg) specs.LinuxSyscall {
	return specs.LinuxSyscall{Names: []string{name}, Action: specs.ActAllow, Args: args}
}
