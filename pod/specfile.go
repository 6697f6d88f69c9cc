package pod

import (
	"container/list"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"weak"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/atomicfile"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod/store"
	"github.com/naru-project/naru/runtime"
)

const (
	specSchema   = 1
	specsInCache = 64       // exec probes of so many containers read no file
	profilesKept = 16       // up to so many profiles are not looked through for unused ones
	maxProfile   = 16 << 20 // bytes of a seccomp profile's file
)

// specFiles keeps what the executor was given for each container, so that a
// thousand containers do not keep a thousand OCI specs in memory. The seccomp
// profile, most of a spec's bytes and nearly always the same one, has a file
// of its own, named by its digest, and is shared in memory too. The files go
// with the boot, as the containers do.
type specFiles struct {
	dir      *store.Dir
	profiles string

	mu     sync.Mutex
	cache  map[string]*list.Element // guarded by mu; of *cached
	recent *list.List               // guarded by mu; front = used last
	shared map[string]weak.Pointer[specs.LinuxSeccomp]
	hashes map[weak.Pointer[specs.LinuxSeccomp]]string
}

type cached struct {
	id string
	c  *runtime.Container
}

type specRecord struct {
	Container *runtime.Container `json:"container"`
	Seccomp   string             `json:"seccomp,omitempty"` // digest of the profile
	EnvBytes  [][]byte           `json:"env_bytes,omitempty"`
}

func openSpecFiles(run string) (*specFiles, error) {
	dir, err := store.Open(filepath.Join(run, "specs"), specSchema)
	if err != nil {
		return nil, err
	}
	s := &specFiles{
		dir: dir, profiles: filepath.Join(run, "profiles"),
		cache: make(map[string]*list.Element), recent: list.New(),
		shared: make(map[string]weak.Pointer[specs.LinuxSeccomp]),
		hashes: make(map[weak.Pointer[specs.LinuxSeccomp]]string),
	}
	if err := os.MkdirAll(s.profiles, 0o700); err != nil {
		return nil, fmt.Errorf("make profile folder: %w", err)
	}
	return s, nil
}

// save writes the file of c. c is not changed afterwards, by anybody.
func (s *specFiles) save(c *runtime.Container) error {
	r := specRecord{Container: c}
	bare := *c
	if c.Spec != nil {
		spec := *c.Spec
		bare.Spec, r.Container = &spec, &bare
		if spec.Linux != nil && spec.Linux.Seccomp != nil {
			hash, err := s.saveProfile(spec.Linux.Seccomp)
			if err != nil {
				return err
			}
			linux := *spec.Linux
			linux.Seccomp, r.Seccomp = nil, hash
			spec.Linux = &linux
		}
		if spec.Process != nil {
			r.EnvBytes = envBytes(spec.Process.Env)
		}
	}
	if err := store.Write(s.dir, c.ID, &r, nil, false); err != nil {
		return errs.Wrap(errs.Internal, err)
	}
	s.remember(c)
	return nil
}

func (s *specFiles) saveProfile(p *specs.LinuxSeccomp) (hash string, err error) {
	key := weak.Make(p)
	s.mu.Lock()
	hash = s.hashes[key]
	s.mu.Unlock()
	var data []byte
	if hash == "" {
		if data, err = json.Marshal(p); err != nil {
			return "", errs.New(errs.Internal, "encode seccomp profile: %w", err)
		}
		sum := sha256.Sum256(data)
		hash = hex.EncodeToString(sum[:])
	}
	file := filepath.Join(s.profiles, hash+".json")
	if _, err := os.Lstat(file); errors.Is(err, fs.ErrNotExist) {
		if data == nil {
			if data, err = json.Marshal(p); err != nil {
				return "", errs.New(errs.Internal, "encode seccomp profile: %w", err)
			}
		}
		if err := atomicfile.Write(file, data, 0o600, false); err != nil {
			return "", errs.Wrap(errs.Internal, err)
		}
	}
	s.share(hash, p)
	return hash, nil
}

// share remembers a profile for as long as somebody uses it.
func (s *specFiles) share(hash string, p *specs.LinuxSeccomp) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.hashes) > 64 {
		for k := range s.hashes {
			if k.Value() == nil {
				delete(s.hashes, k)
			}
		}
		for k, w := range s.shared {
			if w.Value() == nil {
				delete(s.shared, k)
			}
		}
	}
	s.hashes[weak.Make(p)] = hash
	if s.shared[hash].Value() == nil {
		s.shared[hash] = weak.Make(p)
	}
}

// get returns what the executor was given for a container. The result is
// shared and must not be changed.
func (s *specFiles) get(id string) (*runtime.Container, error) {
	s.mu.Lock()
	if e := s.cache[id]; e != nil {
		s.recent.MoveToFront(e)
		c := e.Value.(*cached).c
		s.mu.Unlock()
		return c, nil
	}
	s.mu.Unlock()
	c, err := s.read(id)
	if err != nil {
		return nil, errs.New(errs.Internal, "read spec of container %s: %w", short(id), err)
	}
	s.remember(c)
	return c, nil
}

func (s *specFiles) read(id string) (*runtime.Container, error) {
	if !store.ValidID(id) {
		return nil, errors.New("not an id")
	}
	data, err := store.ReadRegular(filepath.Join(s.dir.Path(), id+".json"), store.MaxSize)
	if err != nil {
		return nil, err
	}
	r, _, err := store.Decode[specRecord](specSchema, data)
	switch {
	case err != nil:
		return nil, err
	case r.Container == nil || r.Container.ID != id || r.Container.Spec == nil:
		return nil, errors.New("it is of another container, or empty")
	}
	c := r.Container
	if r.EnvBytes != nil && c.Spec.Process != nil {
		c.Spec.Process.Env = envFromBytes(r.EnvBytes)
	}
	if r.Seccomp != "" {
		p, err := s.readProfile(r.Seccomp)
		if err != nil {
			return nil, fmt.Errorf("seccomp profile: %w", err)
		}
		if c.Spec.Linux == nil {
			c.Spec.Linux = &specs.Linux{}
		}
		c.Spec.Linux.Seccomp = p
	}
	return c, nil
}

func (s *specFiles) readProfile(hash string) (*specs.LinuxSeccomp, error) {
	s.mu.Lock()
	p := s.shared[hash].Value()
	s.mu.Unlock()
	if p != nil {
		return p, nil
	}
	if !store.ValidID(hash) {
		return nil, errors.New("its digest is none")
	}
	data, err := store.ReadRegular(filepath.Join(s.profiles, hash+".json"), maxProfile)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != hash {
		return nil, errors.New("its digest does not match")
	}
	p = new(specs.LinuxSeccomp)
	if err := json.Unmarshal(data, p); err != nil {
		return nil, err
	}
	s.share(hash, p)
	return p, nil
}

func (s *specFiles) remember(c *runtime.Container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.cache[c.ID]; e != nil {
		e.Value.(*cached).c = c
		s.recent.MoveToFront(e)
		return
	}
	s.cache[c.ID] = s.recent.PushFront(&cached{c.ID, c})
	if s.recent.Len() > specsInCache {
		last := s.recent.Back()
		s.recent.Remove(last)
		delete(s.cache, last.Value.(*cached).id)
	}
}

func (s *specFiles) remove(id string) error {
	s.mu.Lock()
	if e := s.cache[id]; e != nil {
		s.recent.Remove(e)
		delete(s.cache, id)
	}
	s.mu.Unlock()
	return s.dir.Remove(id)
}

// sweep removes the files of containers that are not known, and profiles that
// nobody uses.
func (s *specFiles) sweep(known map[string]bool) error {
	names, err := os.ReadDir(s.dir.Path())
	if err != nil {
		return err
	}
	var all []error
	for _, n := range names {
		id, ok := strings.CutSuffix(n.Name(), ".json")
		switch {
		case ok && known[id]:
		case ok && store.ValidID(id) && n.Type().IsRegular():
			all = append(all, s.remove(id))
		default:
			all = append(all, os.RemoveAll(filepath.Join(s.dir.Path(), n.Name())))
		}
	}
	return errors.Join(append(all, s.sweepProfiles())...)
}

// sweepProfiles reads all specs, so it waits until there are many profiles:
// most nodes have one or two.
func (s *specFiles) sweepProfiles() error {
	names, err := os.ReadDir(s.profiles)
	if err != nil || len(names) <= profilesKept {
		return err
	}
	good, bad, err := store.Load[specRecord](s.dir)
	if err != nil || len(bad) > 0 { // a damaged one may name a profile: keep them all
		return err
	}
	used := make(map[string]bool)
	for _, r := range good {
		used[r.Value.Seccomp+".json"] = true
	}
	var all []error
	for _, n := range names {
		if !used[n.Name()] {
			all = append(all, os.RemoveAll(filepath.Join(s.profiles, n.Name())))
		}
	}
	return errors.Join(all...)
}
