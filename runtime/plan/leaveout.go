//go:build !cgo

package plan

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// LeaveOut keeps out of the memory of later children what none of them looks
// at: the Go runtime's tables about its heap. A child runs on a copy of the
// stack of who called Start and reads nothing but that, the program and its
// variables; what else there is would be copied at each clone, and torn down at
// each end, and could be found by whoever gets hold of the child. What is
// mapped later is copied as ever.
//
// With cgo, threads have their stacks and their local storage among what is
// left out here, so there it does nothing.
//
// A mapping that is left out and needed after all ends the child by SIGSEGV,
// which fails the start: nothing that a test can miss.
func LeaveOut() error {
	maps, err := os.Open("/proc/self/maps") //nolint:forbidigo // a file of the kernel
	if err != nil {
		return errs.New(errs.Internal, "read the own memory map: %w", err)
	}
	defer func() { _ = maps.Close() }()
	var here byte // on a stack, and so in the heap
	const around = 1 << 30
	heap := uintptr(unsafe.Pointer(&here))
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		from, to, ok := anonymous(lines.Text())
		// The heap grows by arenas next to those that it has (runtime/malloc.go),
		// and the program is linked to low addresses.
		if !ok || to < 1<<32 || to > heap-around && from < heap+around {
			continue
		}
		if _, _, e := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTFORK); e != 0 {
			return errs.New(errs.Internal, "keep %#x to %#x out of children: %w", from, to, e)
		}
	}
	if err := lines.Err(); err != nil {
		return errs.New(errs.Internal, "read the own memory map: %w", err)
	}
	return nil
}

// anonymous reads a line of /proc/PID/maps (proc_pid_maps(5)). ok: the mapping
// has no file, and is neither the kernel's nor the first stack. The Go runtime
// gives some of its own a name, where the kernel keeps such.
func anonymous(line string) (from, to uintptr, ok bool) {
	f := strings.Fields(line)
	if len(f) < 5 || f[4] != "0" || len(f) > 5 && !strings.HasPrefix(f[5], "[anon:") {
		return 0, 0, false
	}
	_, err := fmt.Sscanf(f[0], "%x-%x", &from, &to)
	return from, to, err == nil
}
