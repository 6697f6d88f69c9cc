package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/images/layers"
	"github.com/naru-project/naru/internal/atomicfile"
	"github.com/naru-project/naru/internal/errs"
)

// recover reads the records and takes up what they name. What nobody names is
// removed: half-made folders of a pull that was cut off, layers of images whose
// removal was.
func (s *Store) recover(ctx context.Context) error {
	keep := map[int]bool{}
	if err := s.eachRecord(ctx, s.dirs.images, func(name string, data []byte) error {
		return s.takeUpImage(name, data, keep)
	}); err != nil {
		return err
	}
	if err := s.eachRecord(ctx, s.dirs.holds, func(name string, data []byte) error {
		return s.takeUpHold(name, data, keep)
	}); err != nil {
		return err
	}
	if err := s.layers.Collect(keep); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settleTags()
	s.publish()
	return nil
}

// eachRecord calls fn with every record file of a folder; those that fn does
// not like go to quarantine.
func (s *Store) eachRecord(ctx context.Context, dir *os.File, fn func(name string, data []byte) error) error {
	list, err := os.ReadDir(dir.Name())
	if err != nil {
		return fmt.Errorf("read records: %w", err)
	}
	log := klog.FromContext(ctx)
	for _, f := range list {
		path := filepath.Join(dir.Name(), f.Name())
		data, err := readRecord(path, f)
		if err == nil {
			err = fn(f.Name(), data)
		}
		switch {
		case err == nil:
		case errors.Is(err, errNewer):
			log.Info("Left a record of a newer release alone", "path", path)
		default:
			to := filepath.Join(s.dirs.quarantine.Name(), fmt.Sprintf("%s.%d", f.Name(), time.Now().UnixNano()))
			log.Error(err, "Moved a damaged record to quarantine", "path", path, "quarantine", to)
			if err := os.Rename(path, to); err != nil {
				log.Error(err, "Could not move a damaged record to quarantine", "path", path)
			}
		}
	}
	return nil
}

func readRecord(path string, f os.DirEntry) ([]byte, error) {
	st, err := f.Info()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || !strings.HasSuffix(f.Name(), ".json") || st.Size() > maxRecord {
		return nil, errs.New(errs.Internal, "read record: not a .json file of at most %d bytes", maxRecord)
	}
	return os.ReadFile(path)
}

func (s *Store) takeUpImage(name string, data []byte, keep map[int]bool) error {
	rec, err := decodeRecord(data)
	if errors.Is(err, errNewer) {
		for _, l := range rec.Layers {
			keep[l.Dir] = true
		}
		return err
	}
	if err != nil {
		return err
	}
	if name != rec.file() {
		return errs.New(errs.Internal, "decode record: it is of image %s", rec.ID)
	}
	cfg, artifact, err := parse(rec.Config, rec.Artifact)
	if err != nil {
		return err
	}
	if len(cfg.DiffIDs) != len(rec.Layers) {
		return errs.New(errs.Internal, "decode record: %d layers, the config has %d", len(rec.Layers), len(cfg.DiffIDs))
	}
	for i, l := range rec.Layers {
		if l.DiffID != cfg.DiffIDs[i] {
			return errs.New(errs.Internal, "decode record: layer %d is %s, the config says %s", i, l.DiffID, cfg.DiffIDs[i])
		}
	}
	ls, err := s.restore(rec.Layers)
	if err != nil {
		return err
	}
	st := &stored{rec: rec, config: cfg, artifact: artifact, layers: ls}
	st.public = s.present(st)
	s.images[rec.ID.String()] = st
	for _, t := range rec.Tags {
		s.seq = max(s.seq, t.Seq)
	}
	return nil
}

// restore takes a reference to each layer, or none.
func (s *Store) restore(infos []layers.Info) ([]*layers.Layer, error) {
	var ls []*layers.Layer
	for _, i := range infos {
		l, err := s.layers.Restore(i)
		if err != nil {
			return nil, errors.Join(err, s.layers.Release(ls...))
		}
		ls = append(ls, l)
	}
	return ls, nil
}

func (s *Store) takeUpHold(name string, data []byte, keep map[int]bool) error {
	var f holdFile
	rest, err := unseal(data, &f, holdKeys)
	if errors.Is(err, errNewer) {
		for _, h := range f.Images {
			for _, l := range h.Layers {
				keep[l.Dir] = true
			}
		}
	}
	if err != nil {
		return err
	}
	if name != f.Owner+".json" {
		return errs.New(errs.Internal, "decode record: it is of owner %.100q", f.Owner)
	}
	h := &hold{rest: rest}
	for _, i := range f.Images {
		ls, err := s.restore(i.Layers)
		if err != nil {
			return errors.Join(err, s.layers.Release(h.all()...))
		}
		h.images = append(h.images, heldImage{id: i.ID, layers: ls})
	}
	s.holds[f.Owner] = h
	return nil
}

// settleTags leaves each name with the image that got it last: a crash between
// two records of one change can leave it with two. The caller holds mu.
func (s *Store) settleTags() {
	last := map[string]uint64{}
	for _, st := range s.images {
		for _, t := range st.rec.Tags {
			last[t.Name] = max(last[t.Name], t.Seq)
		}
	}
	for _, st := range s.images {
		var mine []tag
		for _, t := range st.rec.Tags {
			if t.Seq == last[t.Name] {
				mine = append(mine, t)
			}
		}
		if len(mine) != len(st.rec.Tags) {
			st.rec.Tags = mine
			st.public = s.present(st)
		}
	}
}

// write puts a record on the disk, durably.
func (s *Store) write(r *record) error {
	data, err := r.encode()
	if err != nil {
		return err
	}
	return atomicfile.Write(s.recordPath(r), data, 0o600, true)
}

func (s *Store) recordPath(r *record) string { return filepath.Join(s.dirs.images.Name(), r.file()) }

var holdKeys = map[string]bool{"owner": true, "images": true}

type holdFile struct {
	Owner  string         `json:"owner"`
	Images []holdFileItem `json:"images"`
}

type holdFileItem struct {
	ID     string        `json:"id"`
	Layers []layers.Info `json:"layers"`
}

// hold is what one owner, a container, uses. Guarded by Store.mu.
type hold struct {
	images []heldImage
	rest   map[string]json.RawMessage
}

type heldImage struct {
	id     string
	layers []*layers.Layer
}

func (h *hold) all() []*layers.Layer {
	var ls []*layers.Layer
	for _, i := range h.images {
		ls = append(ls, i.layers...)
	}
	return ls
}

func (h *hold) file(owner string) ([]byte, error) {
	f := holdFile{Owner: owner}
	for _, i := range h.images {
		f.Images = append(f.Images, holdFileItem{ID: i.id, Layers: infos(i.layers)})
	}
	return seal(f, h.rest)
}

func infos(ls []*layers.Layer) []layers.Info {
	out := make([]layers.Info, 0, len(ls))
	for _, l := range ls {
		out = append(out, l.Info)
	}
	return out
}
