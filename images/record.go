package images

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/naru-project/naru/images/layers"
	"github.com/naru-project/naru/internal/errs"
)

// recordSchema is the version of the record format. A record of a newer one is
// left alone: not served, not removed, its layers kept.
const recordSchema = 1

const maxRecord = 32 << 20

// record is an image on the disk.
type record struct {
	ID      digest.Digest `json:"id"`
	Tags    []tag         `json:"tags,omitempty"`
	Digests []string      `json:"digests,omitempty"` // repo@digest of what was pulled
	Config  []byte        `json:"config"`            // the config blob, as verified; of an artifact, the manifest
	// Artifact: it is not an image.
	Artifact bool          `json:"artifact,omitempty"`
	Layers   []layers.Info `json:"layers"` // base first
	// Pulled is when the record was made, as Unix nanoseconds.
	Pulled int64 `json:"pulled,omitempty"`

	rest map[string]json.RawMessage // fields of a later release
}

// tag is a name with the moment it was given: when a crash left a name with
// two images, the later one has it.
type tag struct {
	Name string `json:"name"`
	Seq  uint64 `json:"seq"`
}

// envelope is the file: the checksum is over the bytes of body as they stand.
type envelope struct {
	Schema   int             `json:"schema"`
	Checksum digest.Digest   `json:"checksum"`
	Body     json.RawMessage `json:"body"`
}

func seal(v any, rest map[string]json.RawMessage) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	if len(rest) > 0 {
		all := map[string]json.RawMessage{}
		if err := json.Unmarshal(body, &all); err != nil {
			return nil, fmt.Errorf("encode record: %w", err)
		}
		for k, v := range rest {
			if _, ours := all[k]; !ours {
				all[k] = v
			}
		}
		if body, err = json.Marshal(all); err != nil {
			return nil, fmt.Errorf("encode record: %w", err)
		}
	}
	out, err := json.Marshal(envelope{Schema: recordSchema, Checksum: digest.FromBytes(body), Body: body})
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	return append(out, '\n'), nil
}

// errNewer: the record is of a later release.
var errNewer = errs.New(errs.FailedPrecondition, "the record was written by a newer release")

// unseal checks a file and decodes its body into v. The keys that v does not
// have come back as rest.
func unseal(data []byte, v any, known map[string]bool) (rest map[string]json.RawMessage, err error) {
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, errs.New(errs.Internal, "decode record: %w", err)
	}
	if e.Schema > recordSchema {
		_ = json.Unmarshal(e.Body, v) // as far as it is understood
		return nil, errNewer
	}
	if e.Schema < 1 {
		return nil, errs.New(errs.Internal, "decode record: schema %d", e.Schema)
	}
	if e.Checksum != digest.FromBytes(e.Body) {
		return nil, errs.New(errs.Internal, "decode record: the checksum does not fit")
	}
	if err := json.Unmarshal(e.Body, v); err != nil {
		return nil, errs.New(errs.Internal, "decode record: %w", err)
	}
	all := map[string]json.RawMessage{}
	if err := json.Unmarshal(e.Body, &all); err != nil {
		return nil, errs.New(errs.Internal, "decode record: %w", err)
	}
	for k := range all {
		if known[k] {
			delete(all, k)
		}
	}
	return all, nil
}

var recordKeys = map[string]bool{"id": true, "tags": true, "digests": true, "config": true, "layers": true, "pulled": true, "artifact": true}

func (r *record) encode() ([]byte, error) { return seal(r, r.rest) }

// decodeRecord reads the record of an image and checks that it is whole.
func decodeRecord(data []byte) (*record, error) {
	r := &record{}
	rest, err := unseal(bytes.TrimSpace(data), r, recordKeys)
	if err != nil {
		return r, err
	}
	r.rest = rest
	if err := r.ID.Validate(); err != nil {
		return r, errs.New(errs.Internal, "decode record: id %.100q: %w", r.ID, err)
	}
	if got := r.ID.Algorithm().FromBytes(r.Config); got != r.ID {
		return r, errs.New(errs.Internal, "decode record: the config's digest is %s, not %s", got, r.ID)
	}
	return r, nil
}

// file is the name of the record's file.
func (r *record) file() string { return recordFile(r.ID) }

func recordFile(id digest.Digest) string { return strings.Replace(id.String(), ":", "-", 1) + ".json" }

func (r *record) clone() *record {
	c := *r
	c.Tags = append([]tag(nil), r.Tags...)
	c.Digests = append([]string(nil), r.Digests...)
	return &c
}
