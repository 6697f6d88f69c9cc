package main

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

//go:embed programs/*.c
var programs embed.FS

// compiled builds one of the small C programs, statically, and returns the
// file. C, because a pause process of a peer runtime must stay small to be a
// fair comparison, and because a setuid Go program re-reads its environment.
func compiled(ctx context.Context, dir, name string) (string, error) {
	src, err := programs.ReadFile("programs/" + name + ".c")
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append(src, runtime.GOARCH...))
	out := filepath.Join(dir, name+"-"+hex.EncodeToString(sum[:8]))
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	file := out + ".c"
	if err := os.WriteFile(file, src, 0o600); err != nil {
		return "", err
	}
	defer os.Remove(file)
	cmd := exec.CommandContext(ctx, "gcc", "-Os", "-static", "-s", "-Wl,--build-id=none", "-o", out+".tmp", file)
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("compile %s: %w\n%s", name, err, b)
	}
	return out, os.Rename(out+".tmp", out)
}
