package sys

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DropCapabilities takes the capabilities of mask (one bit for each) from all
// threads of this process, for good: none of its sets holds them afterwards,
// and the bounding set gives them to no program that it executes. It works in
// programs without cgo only (syscall.AllThreadsSyscall).
func DropCapabilities(mask uint64) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	// The bounding set first: that takes CAP_SETPCAP, which mask may hold too.
	for c := range 64 {
		if mask&(1<<c) == 0 {
			continue
		}
		if has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err != nil || has == 0 {
			continue // the kernel does not know it, or it is gone already
		}
		if _, _, e := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0); e != 0 {
			return fmt.Errorf("drop capability %d from the bounding set of all threads (it takes a program built with CGO_ENABLED=0): %w", c, e)
		}
	}
	for i := range data {
		keep := ^uint32(mask >> (32 * i))
		data[i].Effective &= keep
		data[i].Permitted &= keep
		data[i].Inheritable &= keep
	}
	if _, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&data[0])), 0); e != 0 {
		return fmt.Errorf("drop capabilities %#x from all threads: %w", mask, e)
	}
	return nil
}

// LoadFilter loads a seccomp filter (struct sock_filter entries) into all
// threads of this process, those to come included. It takes CAP_SYS_ADMIN.
func LoadFilter(filter []byte, flags uint32) error {
	prog := struct {
		n    uint16
		code unsafe.Pointer
	}{uint16(len(filter) / 8), unsafe.Pointer(&filter[0])}
	flags |= unix.SECCOMP_FILTER_FLAG_TSYNC
	r, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(flags), uintptr(unsafe.Pointer(&prog)))
	if e != 0 {
		return fmt.Errorf("load a seccomp filter of %d instructions: %w", prog.n, e)
	}
	if r != 0 {
		return fmt.Errorf("load a seccomp filter: thread %d has another one", r)
	}
	return nil
}
