package config

import (
	"fmt"
	"reflect"
	"strings"

	"github.com/naru-project/naru/internal/errs"
)

// Change is one key with another value than before.
type Change struct {
	Key  string // with dots between tables
	Old  string // as in a file
	New  string
	Live bool // a running daemon takes it
}

// String is the change as people read it.
func (c Change) String() string { return c.Key + ": " + c.Old + " -> " + c.New }

// Diff lists the keys in which to differs from from, in the order of the file.
func Diff(from, to *Config) []Change {
	var out []Change
	eachKey(reflect.ValueOf(from).Elem(), reflect.ValueOf(to).Elem(), "", func(k key) {
		if !reflect.DeepEqual(k.a.Interface(), k.b.Interface()) {
			out = append(out, Change{Key: k.name, Old: text(k.a), New: text(k.b), Live: k.live})
		}
	})
	return out
}

// CheckReload says why a running daemon cannot take these changes, naming each
// key that stands in the way.
func CheckReload(changes []Change) error {
	var keys []string
	for _, c := range changes {
		if !c.Live {
			keys = append(keys, c.String())
		}
	}
	if len(keys) == 0 {
		return nil
	}
	return errs.New(errs.FailedPrecondition, "only a restart of naru takes a change of %s; nothing was changed", strings.Join(keys, ", of "))
}

// key is one key in two configurations.
type key struct {
	name string
	live bool
	a, b reflect.Value
}

// eachKey visits the keys of a table and of those below it. What has a reload
// tag is a key; what has none is a table.
func eachKey(a, b reflect.Value, prefix string, visit func(key)) {
	for i := range a.NumField() {
		f := a.Type().Field(i)
		name := prefix + f.Tag.Get("toml")
		if reload, ok := f.Tag.Lookup("reload"); ok {
			visit(key{name: name, live: reload == "live", a: a.Field(i), b: b.Field(i)})
			continue
		}
		eachKey(a.Field(i), b.Field(i), name+".", visit)
	}
}

// text is a value in one line.
func text(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case Duration:
		return x.D().String()
	case string:
		return fmt.Sprintf("%q", x)
	case []string:
		return fmt.Sprintf("%q", x)
	default:
		return fmt.Sprintf("%v", x)
	}
}

// markLive marks the keys of a printed file that a running daemon takes, at the
// end of the comment that stands above each.
func markLive(file string) string {
	live := map[string]bool{}
	c := reflect.ValueOf(Default()).Elem()
	eachKey(c, c, "", func(k key) { live[k.name] = k.live })
	lines := strings.Split(file, "\n")
	table := ""
	for i, l := range lines {
		name := ""
		if strings.HasPrefix(l, "[") {
			name = strings.Trim(l, "[]")
			table = name + "."
		} else if k, _, ok := strings.Cut(l, " = "); ok && !strings.HasPrefix(l, "#") {
			name = table + k
		}
		if live[name] && i > 0 && strings.HasPrefix(lines[i-1], "#") {
			lines[i-1] += " [live]"
		}
	}
	return strings.Join(lines, "\n")
}
