package pod

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/naru-project/naru/pod/store"
)

var update = flag.Bool("update", false, "write the golden records of the present schema anew (only before a release of it)")

// filled sets every field of a record to a value that is not zero, the same
// each time, so that a field that gets lost is seen.
func filled(v reflect.Value, n *int) {
	*n++
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		filled(v.Elem(), n)
	case reflect.Struct:
		switch x := v.Addr().Interface().(type) {
		case *time.Time:
			*x = time.Date(2026, 1, 2, 3, 4, *n%60, 0, time.UTC)
			return
		case interface{ UnmarshalText([]byte) error }: // an address or a prefix
			for _, s := range []string{fmt.Sprintf("10.0.0.%d", *n%200), fmt.Sprintf("10.%d.0.0/16", *n%200)} {
				if x.UnmarshalText([]byte(s)) == nil {
					return
				}
			}
		}
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() && f.Tag.Get("json") != "-" {
				filled(v.Field(i), n)
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			filled(v.Index(i), n)
		}
	case reflect.Array:
		for i := range v.Len() {
			filled(v.Index(i), n)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		filled(key, n)
		filled(value, n)
		v.SetMapIndex(key, value)
	case reflect.String:
		v.SetString(fmt.Sprint("text ", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(int64(*n % 100))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n % 100))
	case reflect.Float32, reflect.Float64:
		v.SetFloat(float64(*n))
	}
}

// goldenRecords are a pod and a container with every field set.
func goldenRecords() (*podRecord, *containerRecord) {
	n := 0
	p, c := new(podRecord), new(containerRecord)
	filled(reflect.ValueOf(p).Elem(), &n)
	filled(reflect.ValueOf(c).Elem(), &n)
	p.ID, c.ID, c.PodID = strings.Repeat("a", 64), strings.Repeat("b", 64), strings.Repeat("a", 64)
	p.Handle.ID, p.Phase, c.Phase = p.ID, PhaseReady, PhaseRunning
	c.EnvBytes = nil // in place of Env, where it is needed
	return p, c
}

// TestGoldenRecords: what each released schema wrote is read by this release,
// every field of it, and the present one writes what it wrote. A folder of a
// schema that was released is never written again.
func TestGoldenRecords(t *testing.T) {
	p, c := goldenRecords()
	dirs, _ := filepath.Glob("testdata/state-*")
	now := fmt.Sprintf("testdata/state-%d", recordSchema)
	if *update {
		dirs = []string{now}
		for kind, write := range map[string]func(*store.Dir) error{
			"pods":       func(d *store.Dir) error { return store.Write(d, p.ID, p, nil, false) },
			"containers": func(d *store.Dir) error { return store.Write(d, c.ID, c, nil, false) },
		} {
			d, err := store.Open(filepath.Join(now, kind), recordSchema)
			if err == nil {
				err = write(d)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(dirs) != recordSchema {
		t.Fatalf("golden folders %v, want one of each schema up to %d", dirs, recordSchema)
	}
	for _, dir := range dirs {
		pods := loadGolden[podRecord](t, dir+"/pods")
		ctrs := loadGolden[containerRecord](t, dir+"/containers")
		if dir != now {
			continue
		}
		if !reflect.DeepEqual(pods, p) {
			t.Errorf("the pod is\n%+v, want\n%+v", pods, p)
		}
		if !reflect.DeepEqual(ctrs, c) {
			t.Errorf("the container is\n%+v, want\n%+v", ctrs, c)
		}
		for id, v := range map[string]any{"pods/" + p.ID: p, "containers/" + c.ID: c} {
			want, err := os.ReadFile(filepath.Join(dir, id+".json"))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := store.Encode(recordSchema, &v, nil); err != nil || string(got) != string(want) {
				t.Errorf("%s is written as\n%s, was\n%s (%v)", id, got, want, err)
			}
		}
	}
}

// loadGolden reads the one record of a folder, all of whose fields are known.
func loadGolden[T any, P checked[T]](t *testing.T, dir string) *T {
	t.Helper()
	d, err := store.Open(dir, recordSchema)
	if err != nil {
		t.Fatal(err)
	}
	good, bad, err := store.Load[T](d)
	if err != nil || len(bad) > 0 || len(good) != 1 {
		t.Fatalf("%s: %d records, damaged %v, %v", dir, len(good), bad, err)
	}
	if good[0].Extras != nil {
		t.Errorf("%s: fields that are not known any more: %v", dir, good[0].Extras)
	}
	if err := P(good[0].Value).check(good[0].ID); err != nil {
		t.Errorf("%s: %v", dir, err)
	}
	return good[0].Value
}
