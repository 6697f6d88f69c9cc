package crilog

import (
	"bytes"
	"flag"
	"os"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite golden files")

var someTime = time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("x", 3600))

func formatAll(s Stream, chunks ...string) string {
	var f Format
	var rest []byte
	var out []byte
	for _, c := range chunks {
		f.Stamp(s, someTime)
		src := append(rest, c...)
		for {
			dst, n := f.Append(make([]byte, 0, 64<<10), src)
			if n == 0 {
				break
			}
			out = append(out, dst...)
			src = src[n:]
		}
		rest = append([]byte(nil), src...)
	}
	return string(f.Flush(append(make([]byte, 0, len(out)+64<<10), out...), rest, true))
}

func TestGolden(t *testing.T) {
	in := []struct {
		s      Stream
		chunks []string
	}{
		{Stdout, []string{"hello\n", "\n", "two\nlines\n"}},
		{Stderr, []string{"a line ", "in three ", "writes\nand no end"}},
		{Stdout, []string{"2030-01-01T00:00:00Z stderr F forged\r\x1b[2J\x00\xff\xfe\n"}},
		{Stdout, []string{strings.Repeat("a", MaxContent-1) + "\n"}},
		{Stdout, []string{strings.Repeat("b", MaxContent) + "\n"}},
		{Stdout, []string{strings.Repeat("c", MaxContent+1) + "\n"}},
		{Stdout, []string{strings.Repeat("d", 2*MaxContent), "\n"}},
		{Stderr, []string{strings.Repeat("e", 2*MaxContent+5)}},
	}
	var got bytes.Buffer
	for _, c := range in {
		text := formatAll(c.s, c.chunks...)
		for _, r := range []string{"a", "b", "c", "d", "e"} { // keep the file readable
			text = strings.ReplaceAll(text, strings.Repeat(r, MaxContent-1), "<16383 "+r+">")
		}
		got.WriteString(text)
	}
	const file = "testdata/golden.log"
	if *update {
		if err := os.WriteFile(file, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("got\n%s\nwant\n%s", got.String(), want)
	}
}

func TestStampIsRFC3339Nano(t *testing.T) {
	for _, at := range []time.Time{someTime, time.Unix(0, 0), time.Date(2026, 12, 31, 23, 59, 59, 999999999, time.UTC)} {
		var f Format
		f.Stamp(Stderr, at)
		stamp := string(f.header[:stampLen])
		got, err := time.Parse(time.RFC3339Nano, stamp)
		if err != nil || !got.Equal(at) {
			t.Errorf("%s: %v, want %v", stamp, err, at)
		}
		if string(f.header[stampLen:]) != " stderr F " {
			t.Errorf("header %q", f.header[:])
		}
	}
}

// parseLog is an independent reader: it gives back the bytes of each stream.
func parseLog(t testing.TB, log []byte) (streams [2][]byte) {
	t.Helper()
	if len(log) > 0 && log[len(log)-1] != '\n' {
		t.Fatalf("log ends in a half record: %q", log[max(0, len(log)-80):])
	}
	for len(log) > 0 {
		line, rest, _ := bytes.Cut(log, []byte("\n"))
		log = rest
		f := bytes.SplitN(line, []byte(" "), 4)
		if len(f) != 4 {
			t.Fatalf("record %q has %d fields", line, len(f))
		}
		if _, err := time.Parse(time.RFC3339Nano, string(f[0])); err != nil {
			t.Fatalf("record %.80q: %v", line, err)
		}
		var s Stream
		switch string(f[1]) {
		case "stdout":
		case "stderr":
			s = Stderr
		default:
			t.Fatalf("record %.80q: stream", line)
		}
		if len(f[3]) > MaxContent {
			t.Fatalf("record of %d bytes", len(f[3]))
		}
		streams[s] = append(streams[s], f[3]...)
		switch string(f[2]) {
		case "F":
			streams[s] = append(streams[s], '\n')
		case "P":
			if len(f[3]) == 0 {
				t.Fatal("empty P record")
			}
		default:
			t.Fatalf("record %.80q: tag", line)
		}
	}
	return streams
}

func FuzzFormat(f *testing.F) {
	f.Add([]byte("hello\nworld"), 3)
	f.Add([]byte("\n\n\n"), 1)
	f.Add(bytes.Repeat([]byte("x"), 3*MaxContent), 1000)
	f.Add(append(bytes.Repeat([]byte("y"), MaxContent), '\n'), MaxContent)
	f.Fuzz(func(t *testing.T, in []byte, cut int) {
		if len(in) == 0 {
			return
		}
		cut = min(max(cut, 1), len(in))
		got := formatAll(Stdout, string(in[:cut]), string(in[cut:]))
		if whole := formatAll(Stdout, string(in)); got != whole {
			t.Fatalf("cut at %d changes the log", cut)
		}
		back := parseLog(t, []byte(got))
		want := in
		if in[len(in)-1] != '\n' {
			want = append(append([]byte(nil), in...), '\n')
		}
		if !bytes.Equal(back[0], want) || len(back[1]) != 0 {
			t.Fatalf("%q came back as %q", want, back[0])
		}
	})
}

func FuzzNote(f *testing.F) {
	var n note
	p := make([]byte, noteSize)
	n.put(p)
	f.Add(p)
	f.Fuzz(func(t *testing.T, p []byte) {
		n, err := parseNote(p)
		if err != nil {
			return
		}
		q := make([]byte, noteSize)
		n.put(q)
		m, err := parseNote(q)
		if err != nil || m != n {
			t.Fatalf("%+v became %+v, %v", n, m, err)
		}
	})
}
