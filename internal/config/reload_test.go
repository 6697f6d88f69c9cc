package config

import (
	"strings"
	"testing"

	"github.com/naru-project/naru/internal/errs"
)

func TestDiff(t *testing.T) {
	from, to := Default(), Default()
	if c := Diff(from, to); len(c) != 0 {
		t.Fatalf("no difference, but %v", c)
	}
	to.Log.Verbosity = 5
	to.Images.Pinned = []string{"a", "b"}
	to.Images.PullTimeout = 0
	to.Handlers["fast"] = Handler{Kind: "native"}
	got := Diff(from, to)
	var texts []string
	for _, c := range got {
		texts = append(texts, c.String())
	}
	want := `log.verbosity: 2 -> 5|images.pinned: [] -> ["a" "b"]|images.pull_timeout: 12h0m0s -> 0s|handlers: map[] -> map[fast:{native}]`
	if strings.Join(texts, "|") != want {
		t.Errorf("got  %s\nwant %s", strings.Join(texts, "|"), want)
	}
	if err := CheckReload(got); err != nil {
		t.Error(err)
	}
	to.Root, to.Network.PodCIDR = "/elsewhere", []string{"10.0.0.0/24"}
	err := CheckReload(Diff(from, to))
	if !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), `root: "/var/lib/naru" -> "/elsewhere", of network.pod_cidr: ["auto"]`) || strings.Contains(err.Error(), "verbosity") {
		t.Error(err)
	}
}

func TestLiveKeysAreMarked(t *testing.T) {
	text := DefaultFile()
	for line, want := range map[string]bool{"verbosity = 2": true, "pinned = []": true, "[handlers]": true, "root = ": false, "pod_cidr = ": false, "driver = ": false} {
		before, _, ok := strings.Cut(text, "\n"+line)
		if !ok {
			t.Fatalf("no line %q", line)
		}
		if got := strings.HasSuffix(before, " [live]"); got != want {
			t.Errorf("%s is marked live: %v, want %v", line, got, want)
		}
	}
}
