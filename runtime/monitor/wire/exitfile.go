package wire

import (
	"bytes"
	"strconv"
)

// The file exits/<id> in the keeper's folder tells how a container ended. It
// is text, so that a person can read it when all else is gone.
const exitFileHead = "naru-exit 1\n"

// ExitFile returns the contents of an exit file.
func ExitFile(x *Exit) []byte {
	b := []byte(exitFileHead)
	for _, f := range []struct {
		name  string
		value int64
	}{{"pid", int64(x.PID)}, {"status", int64(x.Status)}, {"signal", int64(x.Signal)}, {"time", x.Time}, {"unknown", b2i(x.Unknown)}} {
		b = append(b, f.name...)
		b = append(b, '=')
		b = strconv.AppendInt(b, f.value, 10)
		b = append(b, '\n')
	}
	return b
}

func b2i(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// ParseExitFile reads an exit file. Lines that it does not know are those of a
// later release.
func ParseExitFile(id string, p []byte) (*Exit, error) {
	rest, ok := bytes.CutPrefix(p, []byte(exitFileHead))
	if !ok {
		return nil, ErrMalformed
	}
	x := &Exit{ID: id}
	var unknown int64
	fields := map[string]func(int64){
		"pid":     func(n int64) { x.PID = int(int32(n)) },
		"status":  func(n int64) { x.Status = int(int32(n)) },
		"signal":  func(n int64) { x.Signal = int(int32(n)) },
		"time":    func(n int64) { x.Time = n },
		"unknown": func(n int64) { unknown = n },
	}
	for len(rest) > 0 {
		var line []byte
		line, rest, ok = bytes.Cut(rest, []byte("\n"))
		name, value, eq := bytes.Cut(line, []byte("="))
		if !ok || !eq {
			return nil, ErrMalformed
		}
		set := fields[string(name)]
		if set == nil {
			continue
		}
		n, err := strconv.ParseInt(string(value), 10, 64)
		if err != nil {
			return nil, ErrMalformed
		}
		set(n)
		delete(fields, string(name))
	}
	if len(fields) > 0 {
		return nil, ErrMalformed // written half, or not by a keeper
	}
	x.Unknown = unknown != 0
	return x, nil
}
