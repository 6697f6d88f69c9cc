package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestKubelet(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ours := write("ours.yaml", "containerRuntimeEndpoint: unix:///run/naru/naru.sock\n")
	off := write("off.yaml", "containerRuntimeEndpoint: unix:///run/naru/naru.sock\nfeatureGates: {PodAndContainerStatsFromCRI: false, X: true}\n")
	other := write("other.yaml", "containerRuntimeEndpoint: unix:///run/containerd/containerd.sock\n")
	broken := write("broken.yaml", "featureGates: [\n")
	write("dropins/sub/10.conf", "featureGates: {PodAndContainerStatsFromCRI: true}\n")
	write("dropins/20.yaml", "featureGates: {PodAndContainerStatsFromCRI: false}\n") // not read: its name
	dropins := filepath.Join(dir, "dropins")
	shipped := filepath.Join("..", "..", "..", "packaging", "kubelet.conf.d")
	for name, c := range map[string]struct {
		args   []string
		status Status
		detail string
	}{
		"no flags":            {nil, Warn, "is off"},
		"config":              {[]string{"--config", ours}, Warn, "is off"},
		"drop-in":             {[]string{"--config=" + off, "--config-dir", dropins}, OK, "asks Naru"},
		"shipped drop-in":     {[]string{"--config=" + off, "--config-dir=" + shipped}, OK, "asks Naru"},
		"flag":                {[]string{"--config", ours, "--feature-gates=X=true,PodAndContainerStatsFromCRI=true"}, OK, "asks Naru"},
		"flag over drop-in":   {[]string{"--config-dir", dropins, "--feature-gates", "PodAndContainerStatsFromCRI=false"}, Warn, "is off"},
		"another runtime":     {[]string{"--config", other}, OK, "another runtime"},
		"endpoint by flag":    {[]string{"--config", other, "--container-runtime-endpoint=/run/naru/naru.sock"}, Warn, "is off"},
		"a broken file":       {[]string{"--config", broken}, Warn, "yaml"},
		"a file that is gone": {[]string{"--config", filepath.Join(dir, "none")}, Warn, "none"},
	} {
		t.Run(name, func(t *testing.T) {
			proc := filepath.Join(t.TempDir(), "proc")
			if err := os.MkdirAll(filepath.Join(proc, "17"), 0o700); err != nil {
				t.Fatal(err)
			}
			for file, text := range map[string]string{"comm": "kubelet\n", "cmdline": strings.Join(append([]string{"/usr/bin/kubelet"}, c.args...), "\x00") + "\x00"} {
				if err := os.WriteFile(filepath.Join(proc, "17", file), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got := checkKubelet(t.Context(), &Config{Proc: proc, Socket: "/run/naru/naru.sock"})
			if len(got) != 1 || got[0].Status != c.status || !strings.Contains(got[0].Detail, c.detail) {
				t.Errorf("%+v, want %s with %q", got, c.status, c.detail)
			}
		})
	}
	if got := checkKubelet(t.Context(), &Config{Proc: t.TempDir()}); got[0].Status != OK {
		t.Errorf("no kubelet: %+v", got)
	}
}

// FuzzKubeletConfig: a file of the kubelet's, or of whoever wrote it.
func FuzzKubeletConfig(f *testing.F) {
	f.Add([]byte("containerRuntimeEndpoint: x\nfeatureGates: {A: true}\n"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		var k kubeletConfig
		_ = k.merge(b)
	})
}
