// Package admin is what Naru's own command line asks the daemon for and CRI has
// no words for: running operations, pulls, loading images, the configuration in
// effect and its reload. HTTP with JSON on a unix socket, for root alone; the caller of Serve
// brings a listener that refuses others (mode 0600 and SO_PEERCRED).
//
// A load sends the archive as the body of its request and gets back, while it
// sends, one JSON object a line: progress, and at the end the references or the
// error.
//
// It must not know the packages that do the work: a Backend is handed in.
//
// Concurrency: requests are served concurrently. Lists answer from memory.
package admin

import (
	"context"
	"io"
	"time"
)

// SocketName is the socket's name in the run folder.
const SocketName = "admin.sock"

// Operation is one running change of a pod or container.
type Operation struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Kind    string    `json:"kind"`
	Step    string    `json:"step"`
	Started time.Time `json:"started"`
	StepAt  time.Time `json:"step_at"`
}

// Pull is one image being fetched.
type Pull struct {
	Ref       string    `json:"ref"`
	Stage     string    `json:"stage"`
	Bytes     int64     `json:"bytes"`
	Total     int64     `json:"total"` // 0 = not known yet
	Layers    int       `json:"layers"`
	AllLayers int       `json:"all_layers"`
	Waiting   int       `json:"waiting"` // callers
	Started   time.Time `json:"started"`
}

// Version of the daemon.
type Version struct {
	Version string    `json:"version"`
	Go      string    `json:"go"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
}

// Reload is what taking a new configuration did.
type Reload struct {
	File    string   `json:"file"` // that the daemon reads
	Changes []Change `json:"changes"`
}

// Change is one key of the configuration with another value than before.
type Change struct {
	Key string `json:"key"`
	Old string `json:"old"`
	New string `json:"new"`
}

// Backend does the work.
type Backend interface {
	Operations() []Operation
	Pulls() []Pull
	Version() Version
	// Config is the configuration in effect, as TOML. It holds no secrets.
	Config() (string, error)
	// Reload reads the configuration again and takes it, or refuses all of it.
	Reload() (Reload, error)
	// LoadImage reads an archive of images from r. name, which may be empty,
	// takes the place of the archive's own. It returns the references.
	LoadImage(ctx context.Context, r io.Reader, name string) ([]string, error)
	// ImportImage is LoadImage for an archive or OCI layout at an absolute path
	// of the daemon's host.
	ImportImage(ctx context.Context, path, name string) ([]string, error)
}

// Progress of a load: first bytes that arrived, then what is done with them.
type Progress struct {
	Stage string `json:"stage"` // receive, unpack
	Bytes int64  `json:"bytes"`
}

// event is one line of a load's answer; exactly one field is set.
type event struct {
	Progress *Progress `json:"progress,omitempty"`
	Refs     []string  `json:"refs,omitempty"`
	Error    *wireErr  `json:"error,omitempty"`
	Done     bool      `json:"done,omitempty"`
}

// wireErr is an error of internal/errs on its way.
type wireErr struct {
	Class   string `json:"class"`
	Message string `json:"message"`
}
