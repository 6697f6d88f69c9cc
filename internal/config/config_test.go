package config

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/naru-project/naru/internal/errs"
)

func TestDefaultFileIsTheDefault(t *testing.T) {
	c := &Config{}
	if err := c.Parse([]byte(DefaultFile())); err != nil {
		t.Fatal(err)
	}
	c.Handlers = Default().Handlers // an empty table is not printed
	if !reflect.DeepEqual(c, Default()) {
		t.Errorf("the printed file reads back as\n%+v\nwant\n%+v", c, Default())
	}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
}

func TestEveryKeyHasAComment(t *testing.T) {
	var walk func(r reflect.Type, at string)
	walk = func(r reflect.Type, at string) {
		for f := range r.Fields() {
			if f.Type.Kind() == reflect.Struct {
				walk(f.Type, at+f.Name+".")
				continue
			}
			if f.Tag.Get("comment") == "" || f.Tag.Get("toml") == "" {
				t.Errorf("%s%s has no comment or no toml name", at, f.Name)
			}
			if r := f.Tag.Get("reload"); r != "live" && r != "restart" {
				t.Errorf("%s%s does not say whether a reload takes it: reload:%q, want live or restart", at, f.Name, r)
			}
		}
	}
	walk(reflect.TypeFor[Config](), "")
}

func TestDropInsAndMistakes(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "config.toml")
	write := func(name, text string) {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("config.toml", "version = 1\n[network]\npod_cidr = ['10.1.0.0/24']\nmtu = 1400\n")
	write("config.d/20-b.toml", "[network]\nmtu = 9000\n")
	write("config.d/10-a.toml", "[network]\nmtu = 1300\n[images]\nprogress_timeout = '1m'\n")
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if c.Network.MTU != 9000 || c.Network.PodCIDR[0] != "10.1.0.0/24" || c.Images.Progress.D().Seconds() != 60 {
		t.Errorf("merged: %+v", c)
	}
	for text, want := range map[string]string{
		"[network]\npod_cird = ['auto']\n":                             `did you mean "network.pod_cidr"`,
		"version = 2\n":                                                "version: 2 is not known",
		"[network]\npod_cidr = ['10.0.0.0']\n":                         "not a range",
		"[network]\npod_cidr = ['auto', '10.0.0.0/8']\n":               "stands alone",
		"[images]\nprogress_timeout = '5'\n":                           "is not a duration",
		"[streaming]\naddress = '0.0.0.0:0'\n":                         "loopback",
		"[cgroup]\ndriver = 'systemctl'\n":                             "none of auto",
		"[handlers.kata]\nkind = 'oci'\n":                              "handlers.kata.path",
		"[handlers.kata]\nkind = 'shim'\n":                             "none of native, oci",
		"[handlers.runc]\nkind = 'native'\n":                           "reserved",
		"[handlers.naru]\nkind = 'native'\n":                           "built in",
		"[handlers.'a/b']\nkind = 'native'\n":                          "no name for a handler",
		"[handlers.x]\nkind = 'native'\npath = '/x'\n":                 "are for kind",
		"[handlers.x]\nkind = 'oci'\npath = 'runc'\n":                  "absolute path",
		"[handlers.x]\nkind = 'oci'\npath = '/x'\nargs = ['create']\n": "not an option",
		"root = 'relative'\n":                                          "absolute",
		"[network]\nmtuu = 1\n[images]\npined = []\n":                  "images.pinned",
		"[network]\nmtu = 600\n":                                       "1280",
		"[cdi]\nspec_dirs = ['cdi']\n":                                 "cdi.spec_dirs",
		"[runtime]\nhook_dirs = ['hooks.d']\n":                         "runtime.hook_dirs",
		"[tracing]\nendpoint = 'http://127.0.0.1:4317'\n":              "host:port",
		"[tracing]\nendpoint = '127.0.0.1:otlp'\n":                     "port number",
		"[tracing]\nendpoint = 'unix://otlp.sock'\n":                   "absolute path",
		"[tracing]\nsampling_rate_per_million = 1000001\n":             "1000000",
		"[containers]\njournald_socket = 'journal'\n":                  "containers.journald_socket",
		"this is no toml":                                              "line 1",
		"[network]\nmtu = 'large'\n":                                   "line 2",
		"socket = '/" + strings.Repeat("x", 120) + "'\n":               "longer than",
		"[metrics]\naddress = '0.0.0.0:9640'\n":                        "loopback",
		"[metrics]\naddress = 'unix://naru.sock'\n":                    "absolute",
		"[metrics]\naddress = '127.0.0.1:http'\n":                      "port",
	} {
		write("config.d/30-bad.toml", text)
		_, err := Load(file)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q in it", text, err, want)
		}
	}
	if _, err := Load(filepath.Join(dir, "absent.toml")); err == nil {
		t.Error("a missing file that was named is no error")
	}
}

// TestDropInThatIsNoFile: neither a FIFO nor a folder nor a huge file stops the
// daemon from saying what is wrong.
func TestDropInThatIsNoFile(t *testing.T) {
	for name, mk := range map[string]func(p string) error{
		"fifo":   func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"folder": func(p string) error { return os.Mkdir(p, 0o700) },
		"huge":   func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte("#\n"), maxSize), 0o600) },
	} {
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "config.d"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte("version = 1\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := mk(filepath.Join(dir, "config.d", "10.toml")); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(filepath.Join(dir, "config.toml")); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFileReadsBack: what "config show" prints is a valid configuration.
func TestFileReadsBack(t *testing.T) {
	c := Default()
	c.Network.MTU = 9000
	c.Images.Pinned = []string{"a*"}
	c.Handlers = map[string]Handler{"fast": {Kind: "native"}}
	text, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	back := &Config{}
	if err := back.Parse([]byte(text)); err != nil || !reflect.DeepEqual(back, c) {
		t.Errorf("%v\n%+v\n%+v", err, back, c)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(DefaultFile()))
	f.Add([]byte("[network]\npod_cidr=['x']\n[handlers.a]\nkind='b'"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		c := Default()
		if c.Parse(b) == nil {
			_ = c.Validate()
		}
	})
}

// TestContainerDefaults: what the tables of [containers] may say.
func TestContainerDefaults(t *testing.T) {
	read := func(text string) (*Config, error) {
		path := filepath.Join(t.TempDir(), "config.toml")
		if err := os.WriteFile(path, []byte("[containers]\n"+text), 0o600); err != nil {
			t.Fatal(err)
		}
		return Load(path)
	}
	c, err := read("default_ulimits = ['nofile=1024:4096', 'memlock=unlimited', 'core=0:-1']\ndefault_env = ['A=', 'B=x=y']\ndefault_capabilities = ['CAP_CHOWN']\npids_limit = 9")
	if err != nil {
		t.Fatal(err)
	}
	want := []Ulimit{{"nofile", 1024, 4096}, {"memlock", math.MaxUint64, math.MaxUint64}, {"core", 0, math.MaxUint64}}
	if !slices.Equal(c.Default.Ulimits, want) {
		t.Errorf("%v", c.Default.Ulimits)
	}
	if b, _ := c.Default.Ulimits[2].MarshalText(); string(b) != "core=0:unlimited" {
		t.Errorf("%s", b)
	}
	for text, words := range map[string]string{
		"default_ulimits = ['nofile']":             "NAME=SOFT:HARD",
		"default_ulimits = ['files=3']":            "NAME=SOFT:HARD",
		"default_ulimits = ['nofile=many']":        "neither a number",
		"default_ulimits = ['nofile=5:4']":         "above the hard",
		"default_ulimits = ['nofile=5:']":          "neither a number",
		"default_env = ['SECRET']":                 "NAME=VALUE",
		"default_env = ['=x']":                     "NAME=VALUE",
		"default_capabilities = ['CHOWN']":         "no capability",
		"default_capabilities = ['CAP_NOBODY']":    "no capability",
		"pids_limit = -1":                          "negative",
		"device_ownership_from_security_context=1": "bool",
	} {
		if _, err := read(text); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
