package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
)

func blobOf(reg *regtest.Registry, n int) ([]byte, ocispec.Descriptor) {
	data := []byte(strings.Repeat("0123456789abcdef", n/16))
	return data, ocispec.Descriptor{Digest: reg.PutBlob(data), Size: int64(len(data))}
}

func readBlob(ctx context.Context, c *Client, d ocispec.Descriptor, slot Slot) ([]byte, error) {
	rc, err := c.Blob(ctx, d, slot)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rc.Close() }()
	return io.ReadAll(rc)
}

// cut sends n bytes of the answer and breaks the connection.
func cut(w http.ResponseWriter, data []byte, n int, total int) {
	w.Header().Set("Content-Length", fmt.Sprint(total))
	_, _ = w.Write(data[:n])
	if f, ok := w.(http.Flusher); ok {
		f.Flush()
	}
	panic(http.ErrAbortHandler)
}

// Row I-15: a transfer that breaks off goes on only where it was.
func TestResume(t *testing.T) {
	reg := regtest.New(t)
	data, d := blobOf(reg, 4<<20)
	s := newSetup(t)
	var asked atomic.Int32
	reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if asked.Add(1) == 1 {
			cut(w, data, 3<<20, len(data))
		}
		return false
	})
	got, err := readBlob(t.Context(), s.open(reg.Host()+"/app", nil), d, nil)
	if err != nil || string(got) != string(data) || asked.Load() != 2 {
		t.Fatal(len(got), err, asked.Load())
	}
	rs := reg.Requests()
	if got := rs[len(rs)-1].Header.Get("Range"); !strings.HasPrefix(got, "bytes=") {
		t.Errorf("range %q", got)
	}
	// A host without ranges sends all of it again.
	asked.Store(0)
	reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if asked.Add(1) == 1 {
			cut(w, data, 3<<20, len(data))
		}
		_, _ = w.Write(data)
		return true
	})
	if got, err := readBlob(t.Context(), s.open(reg.Host()+"/app", nil), d, nil); err != nil || string(got) != string(data) {
		t.Fatal(len(got), err)
	}
	for name, h := range map[string]string{"another part": "bytes 5-9/10", "nonsense": "items 1", "none": ""} {
		asked.Store(0)
		reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
			if asked.Add(1) == 1 {
				cut(w, data, 3<<20, len(data))
			}
			w.Header().Set("Content-Range", h)
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(data)
			return true
		})
		_, err := readBlob(t.Context(), s.open(reg.Host()+"/app", nil), d, nil)
		wantErr(t, err, errs.FailedPrecondition, "another part")
		_ = name
	}
	// One that always breaks off is given up.
	asked.Store(0)
	reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		asked.Add(1)
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
		cut(w, data, 100, len(data))
		return true
	})
	_, err = readBlob(t.Context(), s.open(reg.Host()+"/app", nil), d, nil)
	wantErr(t, err, errs.Unavailable, UnavailablePrefix, "breaks off")
	if asked.Load() > 10 {
		t.Errorf("asked %d times", asked.Load())
	}
}

func TestBlobFromAnotherHost(t *testing.T) {
	up, mirror := regtest.New(t), regtest.New(t)
	data, d := blobOf(up, 2<<20)
	s := newSetup(t)
	s.hostsFile("registry.example", fmt.Sprintf("server = %q\n[host.%q]\n", up.URL, mirror.URL), nil)
	mirror.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") == "" {
			cut(w, data, 1<<20, len(data))
		}
		w.WriteHeader(http.StatusInternalServerError)
		return true
	})
	if got, err := readBlob(t.Context(), s.open("registry.example/app", nil), d, nil); err != nil || string(got) != string(data) {
		t.Fatal(len(got), err)
	}
}

// Row I-15: sizes other than the promised one, and none at all.
func TestWrongSizes(t *testing.T) {
	reg := regtest.New(t)
	data, d := blobOf(reg, 1<<16)
	s := newSetup(t)
	d.Size++
	_, err := readBlob(t.Context(), s.open(reg.Host()+"/app", nil), d, nil)
	wantErr(t, err, errs.FailedPrecondition, "the manifest says")
	d.Size -= 2
	_, err = readBlob(t.Context(), s.open(reg.Host()+"/app", nil), d, nil)
	wantErr(t, err, errs.FailedPrecondition, "the manifest says")
	// Without a length, endless: one byte too many is read, no more.
	reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		for {
			if _, err := w.Write(data); err != nil {
				return true
			}
		}
	})
	got, err := readBlobN(t.Context(), s.open(reg.Host()+"/app", nil), d, int(d.Size)+1)
	if err != nil || len(got) != int(d.Size)+1 {
		t.Error(len(got), err)
	}
	d.Size++
	reg.SetHook(nil)
	_, err = s.open(reg.Host()+"/app", nil).Config(t.Context(), ocispec.Descriptor{Digest: d.Digest, Size: 9 << 20})
	wantErr(t, err, errs.ResourceExhausted)
}

func readBlobN(ctx context.Context, c *Client, d ocispec.Descriptor, n int) ([]byte, error) {
	rc, err := c.Blob(ctx, d, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rc.Close() }()
	buf := make([]byte, n)
	k, err := io.ReadFull(rc, buf)
	return buf[:k], err
}

func TestStalls(t *testing.T) {
	reg := regtest.New(t)
	data, d := blobOf(reg, 1<<20)
	end := make(chan struct{})
	defer close(end)
	wait := func(r *http.Request) {
		select {
		case <-end:
		case <-r.Context().Done():
		}
	}
	s := newSetup(t)
	for name, hook := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"body stops": func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			_, _ = w.Write(data[:1024])
			w.(http.Flusher).Flush()
			wait(r)
			return true
		},
		"a byte now and then": func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			for i := range data {
				_, err := w.Write(data[i : i+1])
				w.(http.Flusher).Flush()
				if err != nil {
					return true
				}
				select {
				case <-time.After(100 * time.Millisecond):
				case <-r.Context().Done():
					return true
				case <-end:
					return true
				}
			}
			return true
		},
		"no header": func(_ http.ResponseWriter, r *http.Request) bool { wait(r); return true },
	} {
		t.Run(name, func(t *testing.T) {
			reg.SetHook(hook)
			start := time.Now()
			_, err := readBlob(t.Context(), s.open(reg.Host()+"/app", nil), d, nil)
			wantErr(t, err, errs.Unavailable, UnavailablePrefix)
			if e := time.Since(start); e < 700*time.Millisecond || e > 10*time.Second {
				t.Errorf("ended after %s", e)
			}
			// A caller that gives up gets away at once.
			cause := errors.New("enough")
			ctx, cancel := context.WithCancelCause(t.Context())
			time.AfterFunc(100*time.Millisecond, func() { cancel(cause) })
			start = time.Now()
			_, err = readBlob(ctx, s.open(reg.Host()+"/app", nil), d, nil)
			if !errors.Is(err, cause) || time.Since(start) > testhost.Limit(time.Second) {
				t.Errorf("%v after %s", err, time.Since(start))
			}
		})
	}
}

// A slow reader is no stalled host.
func TestSlowReader(t *testing.T) {
	reg := regtest.New(t)
	data, d := blobOf(reg, 8<<20)
	s := newSetup(t)
	s.cfg.ProgressTimeout = 300 * time.Millisecond
	rc, err := s.open(reg.Host()+"/app", nil).Blob(t.Context(), d, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = rc.Close() }()
	time.Sleep(600 * time.Millisecond)
	if got, err := io.ReadAll(rc); err != nil || len(got) != len(data) {
		t.Fatal(len(got), err)
	}
}

type countSlot struct {
	held               atomic.Bool
	released, acquired atomic.Int32
}

func (c *countSlot) Release() {
	if c.held.CompareAndSwap(true, false) {
		c.released.Add(1)
	}
}

func (c *countSlot) Acquire(context.Context) error {
	if c.held.CompareAndSwap(false, true) {
		c.acquired.Add(1)
	}
	return nil
}

func TestSlotIsLentWhileNothingComes(t *testing.T) {
	reg := regtest.New(t)
	data, d := blobOf(reg, 1<<20)
	s := newSetup(t)
	s.cfg.ProgressTimeout = time.Minute
	reg.SetHook(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
		_, _ = w.Write(data[:100])
		w.(http.Flusher).Flush()
		time.Sleep(idleGrace + 500*time.Millisecond)
		_, _ = w.Write(data[100:])
		return true
	})
	slot := &countSlot{}
	if got, err := readBlob(t.Context(), s.open(reg.Host()+"/app", nil), d, slot); err != nil || len(got) != len(data) {
		t.Fatal(len(got), err)
	}
	if slot.released.Load() != 1 || slot.acquired.Load() != 2 {
		t.Errorf("released %d, acquired %d", slot.released.Load(), slot.acquired.Load())
	}
}
