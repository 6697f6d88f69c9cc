package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
)

// busyboxOptions differ from BusyBox's defaults. STATIC, because the image has
// no libraries. PREFER_APPLETS and SH_STANDALONE off, because the shell would
// run "ls" without looking at /bin/ls, and critest masks /bin/ls. TC off,
// because it does not build with current kernel headers.
var busyboxOptions = map[string]string{
	"STATIC":                 "y",
	"FEATURE_PREFER_APPLETS": "n",
	"FEATURE_SH_STANDALONE":  "n",
	"FEATURE_SH_NOFORK":      "n",
	"TC":                     "n",
	"USE_BB_PWD_GRP":         "y",
	"USE_BB_SHADOW":          "y",
}

// applets are what critest and the demo call inside containers.
var applets = strings.Fields(`ash sh top sleep pgrep echo ls cat hostname id netstat ipcs brctl ping mount dd touch
	chmod grep mkdir pidof wget true false head yes seq tail rm ln stat nc httpd env ps kill tr wc cut`)

// builtBusybox builds a static busybox from Debian's source package and
// returns the file. The result is kept in dir under a name made of what went
// into it.
func builtBusybox(ctx context.Context, d *debian, dir string) (string, error) {
	if err := d.prepare(ctx, true); err != nil {
		return "", err
	}
	uris, err := d.run(ctx, d.dir, "apt-get", "-qq", "source", "--print-uris", "--download-only", "busybox")
	if err != nil {
		return "", err
	}
	version := sourceVersion(string(uris))
	if version == "" {
		return "", fmt.Errorf("apt-get source busybox names no .dsc file: %q", uris)
	}
	sum := sha256.Sum256([]byte(fmt.Sprint(version, busyboxOptions, runtime.GOARCH)))
	out := filepath.Join(dir, "busybox-"+hex.EncodeToString(sum[:8]))
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	say("building busybox %s from Debian's source package (about a minute)", version)
	work, err := os.MkdirTemp(dir, "busybox-build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	if _, err := d.run(ctx, work, "apt-get", "-qq", "source", "--download-only", "busybox"); err != nil {
		return "", err
	}
	dsc, _ := filepath.Glob(filepath.Join(work, "*.dsc"))
	if len(dsc) != 1 {
		return "", fmt.Errorf("apt-get source busybox gave %d .dsc files", len(dsc))
	}
	src := filepath.Join(work, "src")
	if _, err := d.run(ctx, work, "dpkg-source", "-x", dsc[0], src); err != nil {
		return "", err
	}
	if err := makeBusybox(ctx, d, src); err != nil {
		return "", err
	}
	return out, os.Rename(filepath.Join(src, "busybox"), out)
}

var dscName = regexp.MustCompile(`\bbusybox_(\S+)\.dsc\b`)

// sourceVersion finds the version in the output of apt-get source --print-uris.
func sourceVersion(uris string) string {
	m := dscName.FindStringSubmatch(uris)
	if m == nil {
		return ""
	}
	if version, err := url.PathUnescape(m[1]); err == nil {
		return version
	}
	return m[1]
}

func makeBusybox(ctx context.Context, d *debian, src string) error {
	if _, err := d.run(ctx, src, "make", "-s", "defconfig"); err != nil {
		return err
	}
	config := filepath.Join(src, ".config")
	b, err := os.ReadFile(config)
	if err != nil {
		return err
	}
	if err := os.WriteFile(config, []byte(setOptions(string(b), busyboxOptions)), 0o600); err != nil {
		return err
	}
	// oldconfig asks about options that the changes made visible.
	if _, err := d.run(ctx, src, "sh", "-c", "yes '' | make -s oldconfig"); err != nil {
		return err
	}
	_, err = d.run(ctx, src, "make", "-s", fmt.Sprintf("-j%d", runtime.NumCPU()), "busybox",
		"KCONFIG_NOTIMESTAMP=1", "EXTRA_CFLAGS=-Wno-error -w")
	return err
}

// setOptions changes options of a Kconfig file and adds those it lacks.
func setOptions(config string, options map[string]string) string {
	for name, value := range options {
		line := "CONFIG_" + name + "=" + value
		if value == "n" {
			line = "# CONFIG_" + name + " is not set"
		}
		re := regexp.MustCompile(`(?m)^(# )?CONFIG_` + name + `( is not set|=.*)$`)
		if re.MatchString(config) {
			config = re.ReplaceAllLiteralString(config, line)
		} else {
			config += line + "\n"
		}
	}
	return config
}

// addBusybox puts busybox and all its applets, as hard links, into the tree;
// the wanted ones must be among them.
func addBusybox(ctx context.Context, d *debian, t tree, binary string, want []string) error {
	if err := t.copyIn("/bin/busybox", binary); err != nil {
		return err
	}
	e := t["/bin/busybox"]
	e.mode = 0o755
	t["/bin/busybox"] = e
	list, err := d.run(ctx, "/", binary, "--list-full")
	if err != nil {
		return err
	}
	have := map[string]bool{}
	for _, name := range strings.Fields(string(list)) {
		if name = "/" + name; name != "/bin/busybox" && !strings.Contains(name, "linuxrc") {
			t.link(name, "/bin/busybox")
			have[filepath.Base(name)] = true
		}
	}
	for _, name := range want {
		if !have[name] {
			return fmt.Errorf("%s has no applet %s", binary, name)
		}
	}
	return nil
}
