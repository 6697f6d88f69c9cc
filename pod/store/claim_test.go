package store

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/naru-project/naru/internal/errs"
)

// A folder with records of a newer schema is refused, in a sentence, and not
// touched; nothing else keeps a daemon from starting.
func TestClaim(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	path := filepath.Join(dir, formatName)
	for _, schema := range []int{1, 1, 2} {
		if err := Claim(dir, schema); err != nil {
			t.Fatal(err)
		}
	}
	newer, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	err = Claim(dir, 1)
	if !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "newer release (schema 2, this one reads 1)") {
		t.Errorf("a newer schema: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != string(newer) {
		t.Errorf("the file was changed to %q", b)
	}
	for i := range newer { // one bit flipped anywhere keeps nobody from starting, or is seen as newer still
		b := []byte(string(newer))
		b[i] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Claim(dir, 2); err != nil {
			t.Errorf("byte %d flipped: %v", i, err)
		}
		if err := Claim(dir, 2); err != nil {
			t.Error(err)
		}
	}
	for _, text := range []string{"", "{}", "null", "\x00", `{"schema":9}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Claim(dir, 1); err != nil {
			t.Errorf("%q: %v", text, err)
		}
		if err := Claim(dir, 1); err != nil {
			t.Error(err)
		}
		_ = os.Remove(path)
	}
}
