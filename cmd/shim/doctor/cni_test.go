package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCNI(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: only files of root are configurations and plugins")
	}
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	cfg := Config{Plugin: "auto", CNIDirs: []string{dir + "/net.d"}, CNIBinDirs: []string{dir + "/bin"}, CNIState: dir + "/state"}
	says := func(what string, want Status, part string) {
		t.Helper()
		r := checkCNI(t.Context(), &cfg)
		if len(r) == 0 || r[0].Status != want || !strings.Contains(r[0].Detail, part) || (want == Fail) != (r[0].Follows != "") {
			t.Errorf("%s: %+v", what, r)
		}
	}
	says("no folder", OK, "built-in network until")
	write("state/in-use", "", 0o600)
	says("it was there", Fail, "no configuration in")
	cfg.Plugin = "builtin"
	says("switched off", OK, "not used")
	cfg.Plugin, cfg.CNIState = "cni", ""
	says("wanted", Fail, "no configuration in")
	write("net.d/10-a.conflist", `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"fake","ipam":{"type":"lease"}}]}`, 0o644)
	says("no plugin", Fail, `"fake" is in none of`)
	write("bin/fake", "", 0o755)
	says("no IPAM plugin", Fail, `"lease" is in none of`)
	write("bin/lease", "", 0o755)
	write("net.d/20-b.conflist", "{", 0o644)
	says("good", OK, `network "a"`)
	says("good", OK, "1 further")
	if err := os.Chmod(dir+"/net.d/10-a.conflist", 0o666); err != nil {
		t.Fatal(err)
	}
	says("writable", Fail, "chmod go-w")
	cfg.CNIDirs = append(cfg.CNIDirs, dir+"/fast.d")
	if r := checkCNI(t.Context(), &cfg); len(r) != 2 || r[1].Status != Fail || !strings.Contains(r[1].Detail, "fast.d") {
		t.Errorf("of a handler: %+v", r)
	}
}
