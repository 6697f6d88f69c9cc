package seccomp

import (
	"sync"

	"github.com/elastic/go-seccomp-bpf/arch"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// x32Bit marks an x32 system call number (__X32_SYSCALL_BIT in the kernel's
// arch/x86/include/uapi/asm/unistd.h).
const x32Bit = 0x40000000

// armPrivate is the first number of ARM's private range (__ARM_NR_BASE):
// cacheflush, set_tls and so on, far above the ordinary table.
const armPrivate = 0x0f0000

// abi is one system call ABI: its audit architecture and table.
type abi struct {
	name   specs.Arch
	audit  uint32
	bit    uint32 // ORed into every number
	narrow bool   // arguments are 32 bits wide
	nrs    map[string]uint32
	mux    map[string]mux
}

// mux says which multiplexer call also reaches a system call.
type mux struct {
	nr   uint32 // of the multiplexer
	call uint32 // its first argument
}

// machine is a GOARCH: its own ABI and those its kernel can also run.
type machine struct {
	native *abi
	compat []*abi // in the order of arch checks
}

// architectures are the names that a profile may list. Most have no table here:
// valid, but never seen by the kernels that Naru runs on.
var architectures = map[specs.Arch]bool{
	specs.ArchMIPS: true, specs.ArchMIPS64: true, specs.ArchMIPS64N32: true,
	specs.ArchMIPSEL: true, specs.ArchMIPSEL64: true, specs.ArchMIPSEL64N32: true,
	specs.ArchPPC: true, specs.ArchPPC64: true, specs.ArchPPC64LE: true,
	specs.ArchS390: true, specs.ArchS390X: true, specs.ArchPARISC: true,
	specs.ArchPARISC64: true, specs.ArchRISCV64: true, specs.ArchLOONGARCH64: true,
	specs.ArchM68K: true, specs.ArchSH: true, specs.ArchSHEB: true,
	specs.ArchX86: true, specs.ArchX86_64: true, specs.ArchX32: true,
	specs.ArchARM: true, specs.ArchAARCH64: true,
}

var machines = map[string]func() *machine{
	"amd64": sync.OnceValue(func() *machine {
		x32 := newABI(specs.ArchX32, arch.X32, notX32)
		x32.bit, x32.narrow = x32Bit, true
		i386 := newABI(specs.ArchX86, arch.I386, nil)
		i386.narrow, i386.mux = true, i386Mux(i386.nrs)
		return &machine{
			native: newABI(specs.ArchX86_64, arch.X86_64, nil),
			compat: []*abi{i386, x32},
		}
	}),
	"arm64": sync.OnceValue(func() *machine {
		arm := newABI(specs.ArchARM, arch.ARM, nil)
		arm.narrow = true
		a64 := newABI(specs.ArchAARCH64, arch.AARCH64, notAARCH64)
		// The header of the generic table spells it fstatat; every profile
		// (and libseccomp) says newfstatat.
		a64.nrs["newfstatat"] = a64.nrs["fstatat"]
		delete(a64.nrs, "fstatat")
		return &machine{native: a64, compat: []*abi{arm}}
	}),
}

// newABI copies a table without the names that the ABI does not really have,
// and with those that are newer than the table. Where a name has two numbers
// (x32 keeps the 64-bit entry beside its own above 511) the higher one is real.
func newABI(name specs.Arch, info *arch.Info, without []string) *abi {
	a := &abi{name: name, audit: uint32(info.ID), nrs: make(map[string]uint32, len(info.SyscallNumbers)+4)}
	for nr, s := range info.SyscallNumbers {
		if old, ok := a.nrs[s]; !ok || uint32(nr) > old {
			a.nrs[s] = uint32(nr)
		}
	}
	for _, s := range without {
		delete(a.nrs, s)
	}
	for s, nr := range newer {
		a.nrs[s] = nr
	}
	return a
}

// newer are system calls (same number on every architecture) that the table
// does not have yet: Linux 6.17 and 6.19.
var newer = map[string]uint32{
	"open_tree_attr": 467,
	"file_getattr":   468,
	"file_setattr":   469,
	"listns":         470,
}

// notAARCH64 are the 32-bit-time twins of the generic table; 64-bit kernels
// leave these numbers empty.
var notAARCH64 = []string{
	"arch_specific_syscall",
	"clock_adjtime64", "clock_getres_time64", "clock_gettime64", "clock_nanosleep_time64",
	"clock_settime64", "futex_time64", "io_pgetevents_time64", "mq_timedreceive_time64",
	"mq_timedsend_time64", "ppoll_time64", "pselect6_time64", "recvmmsg_time64",
	"rt_sigtimedwait_time64", "sched_rr_get_interval_time64", "semtimedop_time64",
	"timer_gettime64", "timer_settime64", "timerfd_gettime64", "timerfd_settime64",
	"utimensat_time64",
}

// notX32 are marked "64" in the kernel's syscall_64.tbl: they do not exist with the x32 bit.
var notX32 = []string{
	"_sysctl", "create_module", "epoll_ctl_old", "epoll_wait_old", "get_kernel_syms",
	"get_thread_area", "map_shadow_stack", "nfsservctl", "query_module", "set_thread_area",
	"uretprobe", "uselib", "vserver",
}

// i386Mux is the kernel's SYS_* of linux/net.h and the calls of linux/ipc.h.
func i386Mux(nrs map[string]uint32) map[string]mux {
	m := make(map[string]mux)
	for i, s := range []string{
		"", "socket", "bind", "connect", "listen", "accept", "getsockname", "getpeername",
		"socketpair", "send", "recv", "sendto", "recvfrom", "shutdown", "setsockopt",
		"getsockopt", "sendmsg", "recvmsg", "accept4", "recvmmsg", "sendmmsg",
	} {
		if s != "" {
			m[s] = mux{nr: nrs["socketcall"], call: uint32(i)}
		}
	}
	for s, call := range map[string]uint32{
		"semop": 1, "semget": 2, "semctl": 3, "semtimedop": 4,
		"msgsnd": 11, "msgrcv": 12, "msgget": 13, "msgctl": 14,
		"shmat": 21, "shmdt": 22, "shmget": 23, "shmctl": 24,
	} {
		m[s] = mux{nr: nrs["ipc"], call: call}
	}
	return m
}

// known reports whether any ABI of the machine has the name, directly or by a multiplexer.
func (m *machine) known(name string) bool {
	for _, a := range append([]*abi{m.native}, m.compat...) {
		if _, ok := a.nrs[name]; ok {
			return true
		}
		if _, ok := a.mux[name]; ok {
			return true
		}
	}
	return false
}
