// Package crilog writes the output of containers to log files in the format
// that kubelet and log collectors read (the CRI log format, see kubelet's
// pkg/kubelet/kuberuntime/logs and the logging design of Kubernetes):
//
//	2026-01-02T03:04:05.000000006Z stdout F text of a line
//
// Format makes records of bytes. Copier moves the bytes of one container from
// its pipes (or terminal) to its log, each exactly once, whenever the process
// that runs it is killed.
//
// # How no byte is lost or doubled
//
// What was read from a pipe into memory dies with the process. So the bytes
// are never only in memory: between the container's pipe and the log lies a
// staging pipe, which another process (the keeper) holds open as well, and
// beside them a small memfd with a note per stream: how far the copier is.
//
//	pipe ──splice──▶ staging pipe ──tee──▶ scratch pipe ──read──▶ records ──▶ log
//	                      └── emptied when the note says "done"
//
//	idle     staging is empty, or holds a batch of which nothing is written
//	writing  the records of the batch are being written from offset O on
//	done     they all are; what is in staging is to be thrown away
//
// Each arrow and each note is one system call that SIGKILL cannot tear. The
// next process finds "writing": it cuts the log back to O and writes the batch
// again; "done": it empties the staging pipe. The bytes of an unfinished line
// are in the memfd too, in one of two places, chosen by the note.
//
// # Concurrency
//
// One goroutine at a time calls the methods of a Copier; the caller sees to
// that. Format and Buffers belong to one goroutine at a time. A Copier blocks
// as long as the log's file system does, so the caller must not wait for it
// where others would suffer.
package crilog

import (
	"bytes"
	"time"
)

// MaxContent is the longest content of one record. A longer line is cut into
// records with the tag P and a last one with the tag F, as containerd, CRI-O
// and docker cut theirs: readers rely on it.
const MaxContent = 16 << 10

const (
	stampLen  = len("2006-01-02T15:04:05.000000000Z")
	headerLen = stampLen + len(" stdout F ")
	tagAt     = headerLen - 2
)

// Stream of a record.
type Stream int

// The streams. A terminal's output counts as stdout.
const (
	Stdout Stream = iota
	Stderr
)

var streamNames = [...]string{"stdout", "stderr"}

// String returns the name as it stands in a record.
func (s Stream) String() string { return streamNames[s] }

// Format makes records of one stream's bytes.
type Format struct {
	header [headerLen]byte
	Mid    bool // the last record had the tag P: the line goes on
}

// Stamp sets stream and time of the records that follow. The time is in UTC
// and of fixed width.
func (f *Format) Stamp(s Stream, t time.Time) {
	b := f.header[:0]
	t = t.UTC()
	year, month, day := t.Date()
	hour, minute, sec := t.Clock()
	b = digits(b, year, 4, '-')
	b = digits(b, int(month), 2, '-')
	b = digits(b, day, 2, 'T')
	b = digits(b, hour, 2, ':')
	b = digits(b, minute, 2, ':')
	b = digits(b, sec, 2, '.')
	b = digits(b, t.Nanosecond(), 9, 'Z')
	b = append(b, ' ')
	b = append(b, streamNames[s]...)
	_ = append(b, " F "...)
}

func digits(b []byte, v, width int, end byte) []byte {
	at := len(b) + width
	b = b[:at]
	for i := at - 1; i >= at-width; i-- {
		b[i] = byte('0' + v%10)
		v /= 10
	}
	return append(b, end)
}

// Append appends to dst, up to its capacity, the records that src completes,
// and returns how many bytes of src they took. What is left is an unfinished
// line of at most MaxContent bytes, unless dst is full.
func (f *Format) Append(dst, src []byte) (out []byte, used int) {
	for used < len(src) {
		rest := src[used:]
		window := rest[:min(len(rest), MaxContent+1)]
		n := bytes.IndexByte(window, '\n')
		tag, skip := byte('F'), 1
		if n < 0 {
			if len(rest) <= MaxContent {
				break
			}
			n, tag, skip = MaxContent, 'P', 0
		}
		if cap(dst)-len(dst) < headerLen+n+1 {
			break
		}
		dst = f.record(dst, rest[:n], tag)
		used += n + skip
	}
	return dst, used
}

// Flush appends the record of an unfinished line: with the tag F at the end of
// the stream, P if more may come.
func (f *Format) Flush(dst, rest []byte, end bool) []byte {
	switch {
	case end && (len(rest) > 0 || f.Mid):
		return f.record(dst, rest, 'F')
	case !end && len(rest) > 0:
		return f.record(dst, rest, 'P')
	}
	return dst
}

func (f *Format) record(dst, content []byte, tag byte) []byte {
	f.header[tagAt] = tag
	f.Mid = tag == 'P'
	dst = append(dst, f.header[:]...)
	dst = append(dst, content...)
	return append(dst, '\n')
}
