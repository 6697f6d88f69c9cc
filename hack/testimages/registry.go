package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// split cuts a reference into registry host and the rest.
func split(ref string) (host, rest string) {
	host, rest, ok := strings.Cut(ref, "/")
	if !ok || (host != "localhost" && !strings.ContainsAny(host, ".:")) {
		return "", ref
	}
	return host, rest
}

// push copies images to the registry at address, under their own names
// without the host: as a mirror is asked for them.
func push(ctx context.Context, address string, images []named) error {
	for _, n := range images {
		_, rest := split(n.ref)
		to, err := name.ParseReference(address+"/"+rest, name.Insecure, name.StrictValidation)
		if err != nil {
			return err
		}
		if err := remote.Write(to, n.image, remote.WithContext(ctx)); err != nil {
			return fmt.Errorf("push %s: %w", to, err)
		}
	}
	return nil
}

// registryHandler serves the distribution API from memory. A mirror's "ns"
// parameter is ignored: no two images differ in the host alone.
func registryHandler(verbose bool) http.Handler {
	out := io.Discard
	if verbose {
		out = os.Stderr
	}
	return registry.New(registry.Logger(log.New(out, "registry: ", log.LstdFlags)))
}

// serveRegistry serves on address (loopback only) until ctx ends. Once the
// images of the layouts are there, it writes its address to addrFile.
func serveRegistry(ctx context.Context, address, addrFile string, verbose bool, layouts []string) error {
	host, _, err := net.SplitHostPort(address)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("--listen %q is not a loopback address with a port", address)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: registryHandler(verbose), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	defer srv.Close()
	for _, dir := range layouts {
		images, err := readLayout(dir)
		if err != nil {
			return err
		}
		if err := push(ctx, l.Addr().String(), images); err != nil {
			return err
		}
	}
	if addrFile != "" {
		if err := os.WriteFile(addrFile+".tmp", []byte(l.Addr().String()+"\n"), 0o644); err != nil {
			return err
		}
		if err := os.Rename(addrFile+".tmp", addrFile); err != nil {
			return err
		}
	}
	fmt.Println(l.Addr())
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
		if errors.Is(context.Cause(ctx), context.Canceled) {
			return nil
		}
		return context.Cause(ctx)
	}
}
