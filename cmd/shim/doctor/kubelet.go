package doctor

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// statsGate is the kubelet's feature gate by which it asks CRI for statistics.
const statsGate = "PodAndContainerStatsFromCRI"

// checkKubelet: does the kubelet ask for the statistics that it cannot find by
// itself? Its command line is /proc's, its files are read as it reads them.
func checkKubelet(_ context.Context, cfg *Config) []Result {
	args := kubeletArgs(cfg.Proc)
	if args == nil {
		return ok("kubelet", "none runs")
	}
	k, err := readKubelet(args)
	if err != nil {
		return result("kubelet", Warn, err.Error(), "whether it asks Naru for statistics is not known")
	}
	return judgeKubelet(k, cfg.Socket)
}

func judgeKubelet(k kubeletConfig, socket string) []Result {
	switch {
	case k.Endpoint != "" && strings.TrimPrefix(k.Endpoint, "unix://") != socket:
		return ok("kubelet", "uses another runtime: %s", k.Endpoint)
	case k.Gates[statsGate]:
		return ok("kubelet", "asks Naru for statistics (%s)", statsGate)
	}
	return result("kubelet", Warn, "its feature gate "+statsGate+" is off",
		"/metrics/cadvisor has no labels of pods and containers, /stats/summary no network of pods: turn it on, see share/naru/kubelet.conf.d")
}

// kubeletArgs returns the command line of the kubelet that runs, or nil.
func kubeletArgs(proc string) []string {
	list, err := os.ReadDir(proc)
	if err != nil {
		return nil
	}
	for _, e := range list {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		comm, err := os.ReadFile(filepath.Join(proc, e.Name(), "comm"))
		if err != nil || string(bytes.TrimSpace(comm)) != "kubelet" {
			continue
		}
		line, err := os.ReadFile(filepath.Join(proc, e.Name(), "cmdline"))
		if err == nil && len(line) > 0 {
			return strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
		}
	}
	return nil
}

// kubeletConfig is what is looked at of a KubeletConfiguration.
type kubeletConfig struct {
	Endpoint string          `yaml:"containerRuntimeEndpoint"`
	Gates    map[string]bool `yaml:"featureGates"`
}

// readKubelet puts together what a kubelet's command line and files say: the
// file of --config, then those of --config-dir that end with .conf, then flags.
func readKubelet(args []string) (kubeletConfig, error) {
	var k kubeletConfig
	var files []string
	if f := flagOf(args, "config"); f != "" {
		files = append(files, f)
	}
	if dir := flagOf(args, "config-dir"); dir != "" {
		_ = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error { // as the kubelet: with the folders below
			if err == nil && !e.IsDir() && filepath.Ext(path) == ".conf" {
				files = append(files, path)
			}
			return nil
		})
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return k, err
		}
		if err := k.merge(b); err != nil {
			return k, err
		}
	}
	if e := flagOf(args, "container-runtime-endpoint"); e != "" {
		k.Endpoint = e
	}
	for gate := range strings.SplitSeq(flagOf(args, "feature-gates"), ",") {
		name, value, _ := strings.Cut(gate, "=")
		if on, err := strconv.ParseBool(value); err == nil {
			k.set(strings.TrimSpace(name), on)
		}
	}
	return k, nil
}

func (k *kubeletConfig) set(gate string, on bool) {
	if k.Gates == nil {
		k.Gates = map[string]bool{}
	}
	k.Gates[gate] = on
}

// merge takes over what a file says.
func (k *kubeletConfig) merge(file []byte) error {
	var more kubeletConfig
	if err := yaml.Unmarshal(file, &more); err != nil {
		return err
	}
	if more.Endpoint != "" {
		k.Endpoint = more.Endpoint
	}
	for gate, on := range more.Gates {
		k.set(gate, on)
	}
	return nil
}

// flagOf returns the last value of a flag, in any of the ways to write it.
func flagOf(args []string, name string) string {
	value := ""
	for i, a := range args {
		a, found := strings.CutPrefix(a, "--")
		if !found {
			continue
		}
		if v, ok := strings.CutPrefix(a, name+"="); ok {
			value = v
		} else if a == name && i+1 < len(args) {
			value = args[i+1]
		}
	}
	return value
}
