package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"
)

// record is one line of a CRI log: 2026-01-01T00:00:00.000000000Z stdout F text.
type record struct {
	at      time.Time
	stream  string
	partial bool
	text    []byte
}

func parseRecord(line []byte) (r record, err error) {
	f := bytes.SplitN(line, []byte(" "), 4)
	if len(f) != 4 {
		return r, fmt.Errorf("record %.100q has %d fields", line, len(f))
	}
	if r.at, err = time.Parse(time.RFC3339Nano, string(f[0])); err != nil {
		return r, err
	}
	r.stream, r.text = string(f[1]), f[3]
	if r.stream != "stdout" && r.stream != "stderr" {
		return r, fmt.Errorf("record %.100q is of no stream", line)
	}
	tag, _, _ := bytes.Cut(f[2], []byte(":")) // more tags may follow
	switch string(tag) {
	case "P":
		r.partial = true
	case "F":
	default:
		return r, fmt.Errorf("record %.100q is neither full nor partial", line)
	}
	return r, nil
}

// numbered reads a log whose streams are the lines 1, 2, 3 … each, and returns
// the last number of each stream. A gap, a repeat and half a record are errors.
func numbered(log io.Reader) (last map[string]int, err error) {
	last = map[string]int{}
	parts := map[string][]byte{}
	b := bufio.NewReaderSize(log, 1<<16)
	for {
		line, err := b.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			if len(line) > 0 {
				return last, fmt.Errorf("the log ends in half a record: %.100q", line)
			}
			break
		}
		if err != nil {
			return last, err
		}
		r, err := parseRecord(line[:len(line)-1])
		if err != nil {
			return last, err
		}
		parts[r.stream] = append(parts[r.stream], r.text...)
		if r.partial {
			continue
		}
		n, err := strconv.Atoi(string(parts[r.stream]))
		if err != nil || n != last[r.stream]+1 {
			return last, fmt.Errorf("%s has %.100q after %d", r.stream, parts[r.stream], last[r.stream])
		}
		last[r.stream], parts[r.stream] = n, nil
	}
	for stream, p := range parts {
		if len(p) > 0 {
			return last, fmt.Errorf("%s ends in half a line: %.100q", stream, p)
		}
	}
	return last, nil
}
