package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"
)

// Bounds of one document, over and above its size.
const (
	maxDepth  = 64
	maxValues = 1 << 20
)

// Unmarshal decodes one JSON document into v and refuses what encoding/json
// lets through and two readers could read in two ways: duplicate keys, keys
// that differ from a field's name only by case (encoding/json would take
// them), text behind the document, invalid UTF-8 and deep nesting.
func Unmarshal(data []byte, v any) error {
	if !utf8.Valid(data) {
		return fmt.Errorf("text is not UTF-8")
	}
	c := checker{dec: json.NewDecoder(bytes.NewReader(data))}
	c.dec.UseNumber()
	if err := c.value(reflect.TypeOf(v), 0); err != nil {
		return err
	}
	if _, err := c.dec.Token(); err != io.EOF {
		return fmt.Errorf("there is text behind the JSON document")
	}
	return json.Unmarshal(data, v)
}

type checker struct {
	dec    *json.Decoder
	values int
}

// value reads one value; t is the Go type it will be decoded into, or nil.
func (c *checker) value(t reflect.Type, depth int) error {
	if c.values++; c.values > maxValues {
		return fmt.Errorf("more than %d JSON values", maxValues)
	}
	if depth > maxDepth {
		return fmt.Errorf("nested deeper than %d", maxDepth)
	}
	tok, err := c.dec.Token()
	if err != nil {
		return syntax(err)
	}
	d, ok := tok.(json.Delim)
	if !ok {
		return nil
	}
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if d == '{' {
		err = c.object(t, depth)
	} else {
		err = c.array(t, depth)
	}
	if err != nil {
		return err
	}
	_, err = c.dec.Token() // the closing one
	return syntax(err)
}

func (c *checker) array(t reflect.Type, depth int) error {
	var elem reflect.Type
	if t != nil && (t.Kind() == reflect.Slice || t.Kind() == reflect.Array) {
		elem = t.Elem()
	}
	for c.dec.More() {
		if err := c.value(elem, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) object(t reflect.Type, depth int) error {
	var (
		fields map[string]reflect.Type
		elem   reflect.Type
		seen   = map[string]struct{}{}
	)
	if t != nil {
		switch t.Kind() {
		case reflect.Struct:
			fields = map[string]reflect.Type{}
			collect(t, fields)
		case reflect.Map:
			elem = t.Elem()
		}
	}
	for c.dec.More() {
		tok, err := c.dec.Token()
		if err != nil {
			return syntax(err)
		}
		key, ok := tok.(string)
		if !ok {
			return fmt.Errorf("object key is not a string")
		}
		if _, dup := seen[key]; dup {
			return fmt.Errorf("key %.64q is there twice", key)
		}
		seen[key] = struct{}{}
		next := elem
		if fields != nil {
			if next, err = field(fields, key); err != nil {
				return err
			}
		}
		if err := c.value(next, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func field(fields map[string]reflect.Type, key string) (reflect.Type, error) {
	if t, ok := fields[key]; ok {
		return t, nil
	}
	for name := range fields {
		if strings.EqualFold(name, key) {
			return nil, fmt.Errorf("key %.64q must be spelt %q", key, name)
		}
	}
	return nil, nil
}

// collect lists the JSON names of a struct, those of embedded structs too.
func collect(t reflect.Type, into map[string]reflect.Type) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-":
		case f.Anonymous && name == "" && f.Type.Kind() == reflect.Struct:
			collect(f.Type, into)
		case !f.IsExported():
		case name == "":
			into[f.Name] = f.Type
		default:
			into[name] = f.Type
		}
	}
}

func syntax(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
