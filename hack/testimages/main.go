// Testimages makes the container images that the project's tests, demo and
// benchmark use, from Debian packages and a few lines of C, and serves them
// from a registry on loopback. It needs no container runtime and fetches no
// image from anywhere.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const usageText = `testimages makes container images from Debian packages and serves them.

  testimages build --cache DIR SET...     make sets of images: demo, critest, bench;
                                          prints the folder of each set (OCI layout)
  testimages pad --ref REF --mb N DIR     make a layout with one image of random data
  testimages list DIR                     references and digests in a layout
  testimages archive DIR REF FILE         write one image as an OCI archive
  testimages push --to HOST:PORT DIR [REF...]
  testimages registry --listen 127.0.0.1:PORT [--addr-file FILE] [DIR...]
  testimages replace --from TEXT --to TEXT IN OUT
                                          copy a file, a string in it replaced by one
                                          of the same length
`

var errUsage = errors.New("usage")

// say tells what goes on, on standard error.
func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "testimages: "+format+"\n", args...) }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	commands := map[string]func(context.Context, []string) error{
		"build": buildCommand, "pad": padCommand, "list": listCommand, "archive": archiveCommand,
		"push": pushCommand, "registry": registryCommand, "replace": replaceCommand,
	}
	err := errUsage
	if len(os.Args) > 1 {
		if f, ok := commands[os.Args[1]]; ok {
			err = f(ctx, os.Args[2:])
		}
	}
	switch {
	case errors.Is(err, errUsage):
		fmt.Fprint(os.Stderr, usageText)
		os.Exit(2)
	case err != nil:
		say("%v", err)
		os.Exit(1)
	}
}

// parse parses flags and checks the number of arguments.
func parse(fs *flag.FlagSet, args []string, low, high int) error {
	fs.SetOutput(os.Stderr)
	if err := fs.Parse(args); err != nil || fs.NArg() < low || (high >= 0 && fs.NArg() > high) {
		return errUsage
	}
	return nil
}

func buildCommand(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("build", flag.ContinueOnError)
	cache := fs.String("cache", "", "folder that keeps packages, programs and images")
	if err := parse(fs, args, 1, -1); err != nil || *cache == "" {
		return errUsage
	}
	dir, err := filepath.Abs(*cache)
	if err != nil {
		return err
	}
	m := &maker{debian: &debian{dir: filepath.Join(dir, "debian")}, dir: filepath.Join(dir, "programs")}
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return err
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	for _, set := range fs.Args() {
		out, err := buildSet(ctx, m, dir, set)
		if err != nil {
			return fmt.Errorf("build %s: %w", set, err)
		}
		fmt.Println(out)
	}
	return nil
}

// buildSet makes a set unless this very program has made it before.
func buildSet(ctx context.Context, m *maker, dir, set string) (string, error) {
	sets := map[string]func(context.Context) ([]named, error){"demo": m.demo, "critest": m.critest, "bench": m.bench, "kubelet": m.kubelet}
	build, ok := sets[set]
	if !ok {
		return "", fmt.Errorf("%w: no set is called %q", errUsage, set)
	}
	key, err := ownDigest()
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, "images", set+"-"+key)
	if isFile(filepath.Join(out, "index.json")) {
		return out, nil
	}
	start := time.Now()
	say("making the %s images", set)
	images, err := build(ctx)
	if err != nil {
		return "", err
	}
	old, _ := filepath.Glob(filepath.Join(dir, "images", set+"-*"))
	for _, o := range old {
		if err := os.RemoveAll(o); err != nil {
			return "", err
		}
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o700); err != nil {
		return "", err
	}
	if err := writeLayout(out+".tmp", images); err != nil {
		return "", err
	}
	if err := os.Rename(out+".tmp", out); err != nil {
		return "", err
	}
	say("%d %s images in %.1f s", len(images), set, time.Since(start).Seconds())
	return out, nil
}

// ownDigest tells builds of this program apart: another recipe, another key.
func ownDigest() (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	f, err := os.Open(exe)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// lock waits for other builds in the same cache.
func lock(file string) (unlock func(), err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

func padCommand(_ context.Context, args []string) error {
	fs := flag.NewFlagSet("pad", flag.ContinueOnError)
	ref := fs.String("ref", "localhost/cribench/pull:1", "reference of the image")
	mb := fs.Int("mb", 100, "MB of data")
	layers := fs.Int("layers", 4, "layers that hold it")
	seed := fs.Uint64("seed", 1, "another seed makes other layers")
	if err := parse(fs, args, 1, 1); err != nil || *mb < 1 || *layers < 1 {
		return errUsage
	}
	n, err := padding(*ref, *mb, *layers, *seed)
	if err != nil {
		return err
	}
	return writeLayout(fs.Arg(0), []named{n})
}

func listCommand(_ context.Context, args []string) error {
	fs := flag.NewFlagSet("list", flag.ContinueOnError)
	if err := parse(fs, args, 1, 1); err != nil {
		return err
	}
	images, err := readLayout(fs.Arg(0))
	if err != nil {
		return err
	}
	for _, n := range images {
		digest, err := n.image.Digest()
		if err != nil {
			return err
		}
		fmt.Println(n.ref, digest)
	}
	return nil
}

func archiveCommand(_ context.Context, args []string) error {
	fs := flag.NewFlagSet("archive", flag.ContinueOnError)
	if err := parse(fs, args, 3, 3); err != nil {
		return err
	}
	images, err := readLayout(fs.Arg(0), fs.Arg(1))
	if err != nil {
		return err
	}
	f, err := os.Create(fs.Arg(2))
	if err != nil {
		return err
	}
	return errors.Join(writeArchive(f, images), f.Close())
}

func pushCommand(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("push", flag.ContinueOnError)
	to := fs.String("to", "", "registry, HOST:PORT")
	if err := parse(fs, args, 1, -1); err != nil || *to == "" {
		return errUsage
	}
	images, err := readLayout(fs.Arg(0), fs.Args()[1:]...)
	if err != nil {
		return err
	}
	return push(ctx, *to, images)
}

func registryCommand(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("registry", flag.ContinueOnError)
	listen := fs.String("listen", "127.0.0.1:0", "loopback address and port")
	addrFile := fs.String("addr-file", "", "file to write the address to once all images are there")
	verbose := fs.Bool("v", false, "log requests")
	if err := parse(fs, args, 0, -1); err != nil {
		return err
	}
	return serveRegistry(ctx, *listen, *addrFile, *verbose, fs.Args())
}

// replaceCommand serves critest: one spec pulls an image by a digest that is
// written into the program and that no image made here can have.
func replaceCommand(_ context.Context, args []string) error {
	fs := flag.NewFlagSet("replace", flag.ContinueOnError)
	from := fs.String("from", "", "text to replace")
	to := fs.String("to", "", "text of the same length")
	if err := parse(fs, args, 2, 2); err != nil {
		return err
	}
	if *from == "" || len(*from) != len(*to) {
		return fmt.Errorf("--from and --to must have the same length, not %d and %d", len(*from), len(*to))
	}
	b, err := os.ReadFile(fs.Arg(0))
	if err != nil {
		return err
	}
	n := bytes.Count(b, []byte(*from))
	if n == 0 {
		return fmt.Errorf("%s does not contain %q", fs.Arg(0), *from)
	}
	b = bytes.ReplaceAll(b, []byte(*from), []byte(*to))
	if err := os.WriteFile(fs.Arg(1)+".tmp", b, 0o755); err != nil {
		return err
	}
	say("replaced %s in %d places", strings.SplitN(*from, ":", 2)[0], n)
	return os.Rename(fs.Arg(1)+".tmp", fs.Arg(1))
}
