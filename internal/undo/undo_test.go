package undo

import (
	"context"
	"errors"
	"slices"
	"testing"
)

func TestRunReversedAllJoined(t *testing.T) {
	var l List
	var ran []string
	bad := errors.New("busy")
	fail := true
	for _, n := range []string{"a", "b", "c"} {
		l.Add(n, func(context.Context) error {
			ran = append(ran, n)
			if n == "b" && fail {
				return bad
			}
			return nil
		})
	}
	err := l.Run(t.Context())
	if !errors.Is(err, bad) || err.Error() != "undo b: busy" {
		t.Fatalf("error %v", err)
	}
	if !slices.Equal(ran, []string{"c", "b", "a"}) {
		t.Fatalf("order %v", ran)
	}
	ran, fail = nil, false
	if err := l.Run(t.Context()); err != nil || !slices.Equal(ran, []string{"b"}) {
		t.Fatalf("second run: %v, %v", ran, err)
	}
	if l.Len() != 0 {
		t.Fatal("steps left after success")
	}
}

func TestRelease(t *testing.T) {
	var l List
	l.Add("x", func(context.Context) error { t.Fatal("ran after Release"); return nil })
	l.Release()
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
}
