package doctor

import (
	"context"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// askTime bounds one question to an OCI runtime.
const askTime = 5 * time.Second

// checkHandlers asks each configured OCI runtime for its version.
func checkHandlers(ctx context.Context, cfg *Config) (all []Result) {
	const name = "handlers"
	if len(cfg.Handlers) == 0 {
		return ok(name, "no OCI runtime is configured")
	}
	for _, h := range slices.Sorted(maps.Keys(cfg.Handlers)) {
		out, err := askVersion(ctx, cfg.Handlers[h])
		if err != nil {
			all = append(all, result(name, Warn, fmt.Sprintf("%s: %s --version: %v", h, cfg.Handlers[h], err),
				"pods with the runtime handler "+h+" fail; install the program, or correct handlers."+h+".path")...)
			continue
		}
		all = append(all, ok(name, "%s: %s", h, out)...)
	}
	return all
}

func askVersion(ctx context.Context, program string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "--version")
	cmd.WaitDelay = time.Second // a child of it may hold the pipe
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return "", fmt.Errorf("no answer in %s", askTime)
	}
	if err != nil {
		return "", err
	}
	first, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return strings.ToValidUTF8(first[:min(len(first), 100)], "?"), nil
}
