package crilog

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Beside the notes, the memfd of a container has what the journal is told with
// each of its lines, if it gets them: a length and so many bytes.
const (
	fieldsAt = 128
	// MaxFields is how long that may be.
	MaxFields = carryBase - fieldsAt - 4
)

// WriteFields keeps the fields in the memfd, for the processes to come.
func WriteFields(state int, fields []byte) error {
	if len(fields) > MaxFields {
		return errs.New(errs.InvalidArgument, "journal fields of %d bytes, more than %d", len(fields), MaxFields)
	}
	b := append(binary.LittleEndian.AppendUint32(nil, uint32(len(fields))), fields...)
	if n, err := unix.Pwrite(state, b, fieldsAt); err != nil || n != len(b) {
		return errs.New(errs.Internal, "keep the journal fields: %d of %d bytes, %w", n, len(b), err)
	}
	return nil
}

// ReadFields returns what WriteFields has kept, or nothing.
func ReadFields(state int) []byte {
	var b [4 + MaxFields]byte
	n, err := unix.Pread(state, b[:], fieldsAt)
	if err != nil || n != len(b) {
		return nil
	}
	size := binary.LittleEndian.Uint32(b[:])
	if size == 0 || size > MaxFields {
		return nil
	}
	return bytes.Clone(b[4 : 4+size])
}

// EachRecord calls f with the content of each record in out, which holds whole
// ones, and whether its line goes on in the next.
func EachRecord(out []byte, f func(content []byte, partial bool)) {
	for len(out) > headerLen {
		n := bytes.IndexByte(out[headerLen:], '\n')
		if n < 0 {
			return
		}
		f(out[headerLen:headerLen+n], out[tagAt] == 'P')
		out = out[headerLen+n+1:]
	}
}
