package store

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

type inner struct {
	Name string         `json:"name"`
	Opts map[string]int `json:"opts,omitempty"`
}

type rec struct {
	ID    string           `json:"id"`
	Time  time.Time        `json:"time"`
	In    *inner           `json:"in,omitempty"`
	Items []inner          `json:"items,omitempty"`
	ByKey map[string]inner `json:"by_key,omitempty"`
}

func id(c string) string { return strings.Repeat(c, 64) }

func TestRoundTrip(t *testing.T) {
	d, err := Open(t.TempDir(), 1)
	if err != nil {
		t.Fatal(err)
	}
	v := &rec{ID: id("a"), Time: time.Unix(3, 4).UTC(), In: &inner{Name: "<&>\u2028"}, Items: []inner{{Name: "x"}}}
	for _, sync := range []bool{false, true} {
		if err := Write(d, v.ID, v, nil, sync); err != nil {
			t.Fatal(err)
		}
	}
	good, bad, err := Load[rec](d)
	if err != nil || len(bad) != 0 || len(good) != 1 || !reflect.DeepEqual(good[0].Value, v) || good[0].Extras != nil {
		t.Fatalf("loaded %+v %+v %v", good, bad, err)
	}
	if err := d.Remove(v.ID); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(v.ID); err != nil {
		t.Fatal(err)
	}
	if good, _, _ := Load[rec](d); len(good) != 0 {
		t.Fatal("record left after Remove")
	}
}

func TestUnknownFieldsAreKept(t *testing.T) {
	newer := `{"id":"i","time":"2026-01-02T03:04:05Z","future":{"a":[1,2]},` +
		`"in":{"name":"n","colour":"red"},"items":[{"name":"x"},{"name":"y","size":1e400}],"by_key":{"k":{"name":"z","w":null}}}`
	file := []byte(`{"schema":1,"checksum":"` + checksum([]byte(newer)) + `","record":` + newer + `}`)
	v, x, err := Decode[rec](1, file)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"future", "in.colour", "items[1].size", "by_key.k.w"} {
		if !strings.Contains(x.String(), want) {
			t.Errorf("extras %q lack %s", x, want)
		}
	}
	v.In.Name = "changed"
	out, err := Encode(1, v, x)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"future":{"a":[1,2]}`, `"colour":"red"`, `"size":1e400`, `"w":null`, `"name":"changed"`} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("rewritten record lacks %s: %s", want, out)
		}
	}
	if _, _, err := Decode[rec](1, out); err != nil {
		t.Fatalf("rewritten record is damaged: %v", err)
	}
	// Places that are gone take their extras with them.
	v.In, v.Items = nil, v.Items[:1]
	out, err = Encode(1, v, x)
	if err != nil || bytes.Contains(out, []byte("colour")) || bytes.Contains(out, []byte("size")) {
		t.Fatalf("kept fields without a place: %s, %v", out, err)
	}
}

func TestDamagedFilesAreReportedOneByOne(t *testing.T) {
	dir := t.TempDir()
	d, err := Open(dir, 1)
	if err != nil {
		t.Fatal(err)
	}
	good := &rec{ID: id("1")}
	if err := Write(d, good.ID, good, nil, false); err != nil {
		t.Fatal(err)
	}
	whole, _ := os.ReadFile(d.file(good.ID))
	put := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put(id("2")+".json", nil)
	put(id("3")+".json", whole[:len(whole)/2])
	put(id("4")+".json", bytes.Replace(whole, []byte(`"id":"1`), []byte(`"id":"2`), 1))
	put(id("5")+".json", bytes.Replace(whole, []byte(`"schema":1`), []byte(`"schema":9`), 1))
	put("../"+filepath.Base(dir)+"/short.json", whole)
	put(strings.Repeat("A", 64)+".json", whole)
	put(id("6"), whole)
	put(id("7")+".json", []byte(`{"schema":1,"checksum":"`+checksum([]byte("null"))+`","record":null}`))
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, id("8")+".json")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, id("9")+".json"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, id("b")+".json"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, id("c")+".json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, id("c")+".json"), MaxSize+1); err != nil {
		t.Fatal(err)
	}
	ok, bad, err := Load[rec](d)
	if err != nil || len(ok) != 1 || len(bad) != 12 {
		t.Fatalf("%d good, %d bad, %v: %v", len(ok), len(bad), err, bad)
	}
	q := t.TempDir()
	for _, b := range bad {
		if _, err := d.Quarantine(b.Name, q); err != nil {
			t.Errorf("quarantine %s: %v", b.Name, err)
		}
	}
	if _, bad, _ := Load[rec](d); len(bad) != 0 {
		t.Fatalf("still there: %v", bad)
	}
	if names, _ := os.ReadDir(q); len(names) != 12 {
		t.Fatalf("%d in quarantine", len(names))
	}
}

func TestLoadMissingFolderIsAnError(t *testing.T) {
	d, err := Open(filepath.Join(t.TempDir(), "x"), 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(d.Path()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Load[rec](d); err == nil {
		t.Fatal("a missing folder looks like an empty one")
	}
}

func FuzzDecode(f *testing.F) {
	v := &rec{ID: id("a"), In: &inner{Name: "n"}, Items: []inner{{Name: "x"}}}
	whole, _ := Encode(1, v, nil)
	f.Add(whole)
	f.Add(whole[:40])
	f.Add([]byte(`{"schema":1,"checksum":"","record":{}}`))
	f.Add([]byte(`{"id":"x","zz":[{}],"items":[{"q":1}],"in":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _, _ = Decode[rec](1, data)
		// The same bytes as a record with a right checksum reach the parser proper.
		if !json.Valid(data) {
			return
		}
		raw := bytes.TrimSpace(data)
		file := []byte(`{"schema":1,"checksum":"` + checksum(raw) + `","record":` + string(raw) + `}`)
		v, x, err := Decode[rec](1, file)
		if err != nil {
			return
		}
		out, err := Encode(1, v, x)
		if err != nil {
			t.Fatalf("record read but not written: %v", err)
		}
		v2, _, err := Decode[rec](1, out)
		if err != nil {
			t.Fatal(err)
		}
		a, _ := json.Marshal(v) // an empty list with omitempty comes back as nil
		if b, _ := json.Marshal(v2); !bytes.Equal(a, b) {
			t.Fatalf("rewritten record differs:\n%s\n%s", a, b)
		}
	})
}
