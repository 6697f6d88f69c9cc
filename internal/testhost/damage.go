package testhost

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
)

// Damages are what a disk, a power loss or a person does to a file; others are
// files beside it.
var Damages = []struct {
	Name string
	Do   func(rnd *rand.Rand, path string, others []string) error
}{
	{"random bytes", func(rnd *rand.Rand, path string, _ []string) error {
		b := make([]byte, rnd.IntN(2000))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		return os.WriteFile(path, b, 0o600)
	}},
	{"zeros", func(_ *rand.Rand, path string, _ []string) error {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.WriteFile(path, make([]byte, st.Size()), 0o600)
	}},
	{"truncated", func(rnd *rand.Rand, path string, _ []string) error {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, rnd.Int64N(st.Size()))
	}},
	{"a bit flipped", func(rnd *rand.Rand, path string, _ []string) error {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8)
		return os.WriteFile(path, b, 0o600)
	}},
	{"missing", func(_ *rand.Rand, path string, _ []string) error { return os.Remove(path) }},
	{"another's content", func(rnd *rand.Rand, path string, others []string) error {
		b, err := os.ReadFile(others[rnd.IntN(len(others))])
		if err != nil {
			return err
		}
		return os.WriteFile(path, b, 0o600)
	}},
	{"a folder", func(_ *rand.Rand, path string, _ []string) error {
		if err := os.Remove(path); err != nil {
			return err
		}
		return os.MkdirAll(filepath.Join(path, "in", "it"), 0o700)
	}},
	{"a link", func(_ *rand.Rand, path string, others []string) error {
		if err := os.Remove(path); err != nil {
			return err
		}
		return os.Symlink(others[0], path)
	}},
}

// Stray puts a file that belongs to no record beside one that does.
func Stray(rnd *rand.Rand, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	name := []string{
		fmt.Sprintf("%064x.json", rnd.Uint64()), "README", ".tmp-1-1", filepath.Base(path) + "~", strings.Repeat("A", 64) + ".json", "x.json",
	}[rnd.IntN(6)]
	return os.WriteFile(filepath.Join(dir, name), b, 0o600)
}
