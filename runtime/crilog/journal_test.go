package crilog

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFields(t *testing.T) {
	fd, err := NewState()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if got := ReadFields(fd); got != nil {
		t.Errorf("%q of a new container", got)
	}
	for _, want := range [][]byte{[]byte("A=b\n"), bytes.Repeat([]byte("x"), MaxFields), nil} {
		if err := WriteFields(fd, want); err != nil {
			t.Fatal(err)
		}
		if got := ReadFields(fd); !bytes.Equal(got, want) {
			t.Errorf("%d bytes, want %d", len(got), len(want))
		}
	}
	if err := WriteFields(fd, make([]byte, MaxFields+1)); err == nil {
		t.Error("fields that have no room are kept")
	}
	note := make([]byte, noteSize)
	if _, err := unix.Pread(fd, note, noteSize); err != nil || !bytes.Equal(note, make([]byte, noteSize)) {
		t.Errorf("the notes were touched: %v", note)
	}
}

// FuzzEachRecord: what Format makes of any bytes is told apart again.
func FuzzEachRecord(f *testing.F) {
	f.Add([]byte("one\n\ntwo \x00 F\nrest"))
	f.Add(bytes.Repeat([]byte("x"), MaxContent+3))
	f.Fuzz(func(t *testing.T, src []byte) {
		var fm Format
		fm.Stamp(Stderr, time.Unix(1, 2))
		out, used := fm.Append(make([]byte, 0, 2*len(src)+1<<20), src)
		out = fm.Flush(out, src[used:], true)
		var back []byte
		last := false
		EachRecord(out, func(content []byte, partial bool) {
			back = append(back, content...)
			if last = partial; !partial {
				back = append(back, '\n')
			}
		})
		want := src
		if len(src) > 0 && src[len(src)-1] != '\n' {
			want = fmt.Appendf(nil, "%s\n", src)
		}
		if !bytes.Equal(back, want) || last {
			t.Errorf("%q became %q", src, back)
		}
		EachRecord(src, func([]byte, bool) {}) // no bytes make it fail
	})
}
