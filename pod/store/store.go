// Package store keeps records as files: one folder per kind, one JSON file per
// record, named by its id.
//
// A file is
//
//	{"schema":1,"checksum":"sha256:…","record":{…}}
//
// where the checksum covers the bytes of the record. A file is replaced by
// rename, so it is whole or not there; the checksum catches what the disk or a
// person did to it. Fields that this release does not know are kept when the
// record is rewritten (Extras), so that going back and forth between two
// releases of one schema loses nothing. Nothing read here is trusted: names,
// types of files, sizes and content are checked, and whatever does not pass is
// reported as Damaged rather than as an error of the whole folder.
//
// Concurrency: a Dir may be used by many goroutines; writes to one id are
// serialised by the caller.
package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/atomicfile"
)

// MaxSize bounds a record file. A pod's configuration comes over gRPC, which
// is cut at 16 MiB; escapes may make it longer, a sane one is some KiB.
const MaxSize = 64 << 20

const suffix = ".json"

// Dir is a folder of records of one kind.
type Dir struct {
	path   string
	schema int
}

// Damaged is a file that is not a record of this folder, and why.
type Damaged struct {
	Name string // within the folder
	Err  error
}

// Record is one record read from its file.
type Record[T any] struct {
	ID     string
	Value  *T
	Extras *Extras // nil almost always
}

type envelope struct {
	Schema   int             `json:"schema"`
	Checksum string          `json:"checksum"`
	Record   json.RawMessage `json:"record"`
}

// Open makes the folder if needed and removes files that a crash left unfinished.
func Open(path string, schema int) (*Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("make record folder: %w", err)
	}
	if err := atomicfile.CleanTemp(path); err != nil && !errors.Is(err, unix.EROFS) {
		return nil, fmt.Errorf("clean record folder: %w", err)
	}
	return &Dir{path: path, schema: schema}, nil
}

// Path returns the folder.
func (d *Dir) Path() string { return d.path }

func (d *Dir) file(id string) string { return filepath.Join(d.path, id+suffix) }

// Write makes v the record of id. x is what came with the record when it was read.
func Write[T any](d *Dir, id string, v *T, x *Extras, sync bool) error {
	data, err := Encode(d.schema, v, x)
	if err != nil {
		return fmt.Errorf("encode record %s: %w", id, err)
	}
	return atomicfile.Write(d.file(id), data, 0o600, sync)
}

// Encode makes the content of a record file.
func Encode[T any](schema int, v *T, x *Extras) ([]byte, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	raw = x.merge(raw)
	b := make([]byte, 0, len(raw)+128)
	b = append(b, `{"schema":`...)
	b = strconv.AppendInt(b, int64(schema), 10)
	b = append(b, `,"checksum":"`...)
	b = append(b, checksum(raw)...)
	b = append(b, `","record":`...)
	b = append(b, raw...)
	return append(b, '}', '\n'), nil
}

// Decode reads the content of a record file.
func Decode[T any](schema int, data []byte) (*T, *Extras, error) {
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, nil, fmt.Errorf("parse: %w", err)
	}
	switch {
	case e.Schema > schema:
		return nil, nil, fmt.Errorf("schema %d is newer than this release reads (%d)", e.Schema, schema)
	case e.Schema < 1:
		return nil, nil, fmt.Errorf("schema %d does not exist", e.Schema)
	case e.Checksum != checksum(e.Record):
		return nil, nil, errors.New("checksum does not match")
	case len(e.Record) == 0 || e.Record[0] != '{':
		return nil, nil, errors.New("record is not an object")
	}
	v := new(T)
	dec := json.NewDecoder(bytes.NewReader(e.Record))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err == nil {
		return v, nil, nil
	}
	v = new(T)
	if err := json.Unmarshal(e.Record, v); err != nil {
		return nil, nil, fmt.Errorf("parse record: %w", err)
	}
	return v, collectExtras(v, e.Record), nil
}

func checksum(b []byte) string {
	h := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(h[:])
}

// Load reads all records. An error means that the folder itself could not be
// read: then nobody knows what there should be, and nothing may be swept.
func Load[T any](d *Dir) (good []Record[T], bad []Damaged, err error) {
	names, err := os.ReadDir(d.path)
	if err != nil {
		return nil, nil, fmt.Errorf("read record folder: %w", err)
	}
	for _, n := range names {
		if strings.HasPrefix(n.Name(), atomicfile.TempPrefix) {
			continue
		}
		r, err := load[T](d, n.Name())
		if err != nil {
			bad = append(bad, Damaged{n.Name(), err})
			continue
		}
		good = append(good, r)
	}
	return good, bad, nil
}

func load[T any](d *Dir, name string) (Record[T], error) {
	id, ok := strings.CutSuffix(name, suffix)
	if !ok || !ValidID(id) {
		return Record[T]{}, errors.New("not named like a record")
	}
	data, err := ReadRegular(filepath.Join(d.path, name), MaxSize)
	if err != nil {
		return Record[T]{}, err
	}
	v, x, err := Decode[T](d.schema, data)
	if err != nil {
		return Record[T]{}, err
	}
	return Record[T]{ID: id, Value: v, Extras: x}, nil
}

// Remove removes the record of id; one that is not there is no error.
func (d *Dir) Remove(id string) error { return atomicfile.Remove(d.file(id)) }

// Quarantine moves a damaged file out of the way, into the folder to, where a
// person can look at it.
func (d *Dir) Quarantine(name, to string) (moved string, err error) {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return "", fmt.Errorf("make quarantine folder: %w", err)
	}
	moved = filepath.Join(to, fmt.Sprintf("%s-%d-%s", filepath.Base(d.path), time.Now().UnixNano(), name))
	return moved, os.Rename(filepath.Join(d.path, name), moved)
}

// ValidID reports whether id is 64 lowercase hex digits. Only such a string
// ever becomes part of a path.
func ValidID(id string) bool {
	if len(id) != 64 {
		return false
	}
	for i := range len(id) {
		if c := id[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// ReadRegular reads a regular file of at most limit bytes; it neither follows
// a link nor waits for a FIFO.
func ReadRegular(path string, limit int64) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	case st.Size() > limit:
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, st.Size(), limit)
	}
	data := make([]byte, 0, st.Size()+1)
	buf := bytes.NewBuffer(data)
	if _, err := buf.ReadFrom(io.LimitReader(f, limit)); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}
