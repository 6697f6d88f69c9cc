package doctor

import (
	"context"
	"fmt"

	"github.com/naru-project/naru/sandbox/cni"
)

// checkCNI looks at the configurations and plugins as the daemon does.
func checkCNI(_ context.Context, cfg *Config) (out []Result) {
	const name = "CNI"
	for i, dir := range cfg.CNIDirs {
		ofHandler := i > 0
		if !ofHandler && cfg.Plugin == "builtin" {
			out = append(out, ok(name, "not used: network.plugin is builtin")...)
			continue
		}
		needed := ofHandler || cfg.Plugin == "cni" || cni.WasChosen(cfg.CNIState)
		found := cni.Look(dir)
		switch {
		case found.Err != nil:
			out = append(out, result(name, Fail, found.Err.Error(), "pods with a network of their own cannot start until it is right")...)
		case found.Network == nil && needed:
			out = append(out, result(name, Fail, "no configuration in "+dir,
				`pods with a network of their own wait for it: install a network add-on, or set network.plugin = "builtin"`)...)
		case found.Network == nil:
			out = append(out, ok(name, "no configuration in %s: pods get the built-in network until there is one", dir)...)
		default:
			out = append(out, checkNetwork(name, found, cfg.CNIBinDirs)...)
		}
	}
	return out
}

func checkNetwork(name string, found cni.Found, binDirs []string) []Result {
	what := fmt.Sprintf("network %q of %s", found.Network.Name(), found.Network.File)
	if err := found.Network.Missing(binDirs); err != nil {
		return result(name, Fail, what+": "+err.Error(), "pods with a network of their own cannot start until it can be run")
	}
	if more := len(found.Files) - 1; more > 0 {
		return ok(name, "%s; %d further files, the first by name counts", what, more)
	}
	return ok(name, "%s", what)
}
