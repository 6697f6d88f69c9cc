// Command i386 makes 32-bit system calls for the test of the default profile.
package main

import (
	"fmt"
	"syscall"
	"unsafe"
)

const (
	sysSocketcall = 102
	sysSocket     = 359
	afVsock       = 40
)

func main() {
	report := func(name string, nr, a, b, c uintptr) {
		_, _, errno := syscall.RawSyscall(nr, a, b, c)
		fmt.Printf("%s %d\n", name, int(errno))
	}
	socketcall := func(name string, family uint32) {
		args := [3]uint32{family, syscall.SOCK_STREAM, 0}
		report(name, sysSocketcall, 1, uintptr(unsafe.Pointer(&args)), 0)
	}
	report("socket-inet", sysSocket, syscall.AF_INET, syscall.SOCK_STREAM, 0)
	report("socket-vsock", sysSocket, afVsock, syscall.SOCK_STREAM, 0)
	socketcall("socketcall-inet", syscall.AF_INET)
	socketcall("socketcall-vsock", afVsock)
	report("nr-600", 600, 0, 0, 0)
	report("keyctl", 288, 0, 0, 0)
}
