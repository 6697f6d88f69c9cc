package store

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/naru-project/naru/internal/atomicfile"
	"github.com/naru-project/naru/internal/errs"
)

// formatName is the file that says which schema the records of a state folder
// have at most.
const formatName = "format"

type format struct {
	Schema int `json:"schema"`
}

// Claim says that records of this schema may be in the folder from now on. A
// folder with records of a newer one is refused: they would look damaged, and
// the containers that they tell of would be ended. A format file that is
// damaged, or not there, says nothing.
func Claim(dir string, schema int) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make state folder: %w", err)
	}
	path := filepath.Join(dir, formatName)
	if data, err := ReadRegular(path, MaxSize); err == nil {
		// Of whatever schema: the file itself stays as it is.
		if f, _, err := Decode[format](1, data); err == nil && f.Schema > schema {
			return errs.New(errs.FailedPrecondition,
				"the records in %s are of a newer release (schema %d, this one reads %d): install that release again; pods go on meanwhile", dir, f.Schema, schema)
		} else if err == nil && f.Schema == schema {
			return nil
		}
	}
	data, err := Encode(1, &format{schema}, nil)
	if err != nil {
		return err
	}
	// A disk that is full or read-only is told where a record is to be written;
	// a start does not fail for it.
	_ = atomicfile.Write(path, data, 0o600, true)
	return nil
}
