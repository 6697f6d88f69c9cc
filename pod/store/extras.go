package store

import (
	"encoding"
	"encoding/json"
	"reflect"
	"strconv"
	"strings"
)

// Extras are the fields of a record that its Go type does not have, at any
// depth. They come from a newer release of the same schema.
type Extras struct {
	leaf   json.RawMessage    // an unknown field, whole
	fields map[string]*Extras // of an object
	items  map[int]*Extras    // of an array that had length n
	n      int
}

var (
	jsonType = reflect.TypeFor[json.Unmarshaler]()
	textType = reflect.TypeFor[encoding.TextUnmarshaler]()
)

func collectExtras(v any, raw json.RawMessage) *Extras {
	return collect(reflect.TypeOf(v), raw)
}

// collect compares raw with what a value of type t takes from it.
func collect(t reflect.Type, raw json.RawMessage) *Extras {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if p := reflect.PointerTo(t); p.Implements(jsonType) || p.Implements(textType) {
		return nil
	}
	switch t.Kind() {
	case reflect.Struct:
		return collectObject(raw, fieldsOf(t))
	case reflect.Map:
		return collectObject(raw, func(string) (reflect.Type, bool) { return t.Elem(), true })
	case reflect.Slice, reflect.Array:
		var items []json.RawMessage
		if json.Unmarshal(raw, &items) != nil {
			return nil
		}
		x := &Extras{n: len(items)}
		for i, r := range items {
			if sub := collect(t.Elem(), r); sub != nil {
				if x.items == nil {
					x.items = make(map[int]*Extras)
				}
				x.items[i] = sub
			}
		}
		if x.items == nil {
			return nil
		}
		return x
	}
	return nil
}

func collectObject(raw json.RawMessage, field func(string) (reflect.Type, bool)) *Extras {
	var obj map[string]json.RawMessage
	if json.Unmarshal(raw, &obj) != nil {
		return nil
	}
	fields := make(map[string]*Extras)
	for k, r := range obj {
		ft, known := field(k)
		if !known {
			fields[k] = &Extras{leaf: r}
		} else if sub := collect(ft, r); sub != nil {
			fields[k] = sub
		}
	}
	if len(fields) == 0 {
		return nil
	}
	return &Extras{fields: fields}
}

// fieldsOf finds the type of a field as encoding/json would: by its tag, and
// without regard to case.
func fieldsOf(t reflect.Type) func(string) (reflect.Type, bool) {
	return func(key string) (reflect.Type, bool) {
		for i := range t.NumField() {
			f := t.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name == "" {
				name = f.Name
			}
			if f.IsExported() && strings.EqualFold(name, key) {
				return f.Type, true
			}
		}
		return nil, false
	}
}

// merge puts the fields back into a newly encoded record. What no longer has
// a place (a list of another length, an object that is gone) is dropped.
func (x *Extras) merge(raw json.RawMessage) json.RawMessage {
	if x == nil {
		return raw
	}
	if x.leaf != nil {
		return x.leaf
	}
	if x.fields != nil {
		var obj map[string]json.RawMessage
		if json.Unmarshal(raw, &obj) != nil || obj == nil {
			return raw
		}
		for k, sub := range x.fields {
			if old, ok := obj[k]; ok {
				if sub.leaf == nil {
					obj[k] = sub.merge(old)
				}
			} else if sub.leaf != nil {
				obj[k] = sub.leaf
			}
		}
		return remarshal(obj, raw)
	}
	var items []json.RawMessage
	if json.Unmarshal(raw, &items) != nil || len(items) != x.n {
		return raw
	}
	for i, sub := range x.items {
		items[i] = sub.merge(items[i])
	}
	return remarshal(items, raw)
}

func remarshal(v any, otherwise json.RawMessage) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		return otherwise
	}
	return b
}

// String names the unknown fields, for a log line.
func (x *Extras) String() string {
	var names []string
	x.names("", &names)
	return strings.Join(names, " ")
}

func (x *Extras) names(prefix string, out *[]string) {
	if x == nil {
		return
	}
	if x.leaf != nil {
		*out = append(*out, prefix)
	}
	for k, sub := range x.fields {
		sub.names(strings.TrimPrefix(prefix+"."+k, "."), out)
	}
	for i, sub := range x.items {
		sub.names(prefix+"["+strconv.Itoa(i)+"]", out)
	}
}
