package main

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/naru-project/naru/internal/config"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/metrics"
)

// TestEachLiveKeyReachesAPart: what is said to be live has an effect, and what
// needs a restart has none.
func TestEachLiveKeyReachesAPart(t *testing.T) {
	keys := 0
	var walk func(r reflect.Type, index []int, name string)
	walk = func(r reflect.Type, index []int, name string) {
		for f := range r.Fields() {
			at, key := append(slices.Clone(index), f.Index...), name+f.Tag.Get("toml")
			reload, isKey := f.Tag.Lookup("reload")
			if !isKey {
				walk(f.Type, at, key+".")
				continue
			}
			keys++
			from, to := config.Default(), config.Default()
			alter(t, reflect.ValueOf(to).Elem().FieldByIndex(at))
			if d := config.Diff(from, to); len(d) != 1 || d[0].Key != key || d[0].Live != (reload == "live") {
				t.Fatalf("%s: the difference is %v", key, d)
			}
			if got := !reflect.DeepEqual(liveOf(from), liveOf(to)); got != (reload == "live") {
				t.Errorf("%s: a change reaches a running part: %v; reload says %q", key, got, reload)
			}
		}
	}
	walk(reflect.TypeFor[config.Config](), nil, "")
	if keys < 25 {
		t.Errorf("only %d keys", keys)
	}
}

func alter(t *testing.T, v reflect.Value) {
	t.Helper()
	switch v.Kind() {
	case reflect.Int, reflect.Int64:
		v.SetInt(v.Int() + 7)
	case reflect.Float64:
		v.SetFloat(v.Float() + 0.25)
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.String:
		v.SetString(v.String() + "x")
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
	case reflect.Map:
		m := reflect.MakeMap(v.Type())
		m.SetMapIndex(reflect.ValueOf("x"), reflect.Zero(v.Type().Elem()))
		v.Set(m)
	default:
		t.Fatalf("no other value for a %s", v.Kind())
	}
}

// TestApplyIsAllOrNothing: an error in any part puts back all that were set,
// that one too, in reverse.
func TestApplyIsAllOrNothing(t *testing.T) {
	from, to := live{verbosity: 1}, live{verbosity: 2}
	for fails := range 4 {
		var calls []string
		values := [3]int{1, 1, 1}
		var all []setting
		for i := range values {
			all = append(all, setting{string(rune('a' + i)), func(l live) error {
				calls = append(calls, string(rune('a'+i)))
				values[i] = l.verbosity // also when it fails: half done
				if i == fails && l.verbosity == 2 {
					return errs.New(errs.Unavailable, "the port is taken")
				}
				return nil
			}})
		}
		err := apply(all, from, to)
		if fails == len(all) {
			if err != nil || values != [3]int{2, 2, 2} {
				t.Errorf("without an error: %v %v", values, err)
			}
			continue
		}
		if !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), "reconfigure "+all[fails].part+": the port is taken") {
			t.Errorf("fails at %d: %v", fails, err)
		}
		if values != [3]int{1, 1, 1} {
			t.Errorf("fails at %d: left %v (calls %v)", fails, values, calls)
		}
	}
	stuck := []setting{{"a", func(l live) error {
		if l.verbosity == 1 {
			return errors.New("stuck")
		}
		return nil
	}}, {"b", func(live) error { return errors.New("no") }}}
	if err := apply(stuck, from, to); err == nil || !strings.Contains(err.Error(), "put a back as it was: stuck") {
		t.Errorf("an undo that fails: %v", err)
	}
}

// TestReloadRefusals: nothing is touched when the file is wrong or only a
// restart would do; the daemon here has no parts that could be.
func TestReloadRefusals(t *testing.T) {
	dir := t.TempDir()
	d := &daemon{file: filepath.Join(dir, "config.toml"), metrics: metrics.New("test")}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(d.file, []byte("version = 1\n"+text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	was, err := config.Load(d.file)
	if err != nil {
		t.Fatal(err)
	}
	d.now.Store(was)
	for text, want := range map[string]string{
		"log.verbosity = 9\nlog.verbosty = 1\n":        "verbosty",
		"log.verbosity = 9\nnetwork.mtu = 3\n":         "network.mtu",
		"log.verbosity = 9\nroot = '/x'\n":             `root: "/var/lib/naru" -> "/x"`,
		"network.pod_cidr = ['10.0.0.0/8']\n":          "network.pod_cidr",
		"cgroup.driver = 'systemd'\nrun = '/run/x'\n":  `of cgroup.driver: "auto" -> "systemd"`,
		"images.registry_dirs = ['/a']\nsocket='/s'\n": "socket",
		"this is no toml":                              "line 2",
	} {
		write(text)
		if c, err := d.reload(); err == nil || c != nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v %v", text, c, err)
		}
	}
	write("")
	if c, err := d.reload(); err != nil || len(c) != 0 {
		t.Errorf("nothing changed: %v %v", c, err)
	}
	if err := os.Remove(d.file); err != nil {
		t.Fatal(err)
	}
	if _, err := d.reload(); err == nil {
		t.Error("without the file")
	}
	if d.now.Load() != was {
		t.Error("the configuration in effect changed")
	}
}

func TestReloadCommand(t *testing.T) {
	_, cfg := startNode(t)
	out, _, code := naru(t, "", "config", "reload", "--config", cfg)
	if code != exitOK || out != "/etc/naru/config.toml: reloaded\n  network.mtu: 0 -> 1400\n" {
		t.Errorf("%d %q", code, out)
	}
	if _, stderr, code := naru(t, "", "config", "reload", "--admin-socket", filepath.Join(t.TempDir(), "none")); code != exitError || !strings.Contains(stderr, "is naru running") {
		t.Errorf("%d %q", code, stderr)
	}
}
