package e2e

import (
	"strings"
	"testing"
	"time"
)

func TestJudge(t *testing.T) {
	log := []string{
		`I1130 10:00:01.000000    7 generic.go:1] "nothing"`,
		`E1130 10:00:02.000000    7 remote_runtime.go:193] "RunPodSandbox from runtime service failed" err="x"`,
		`E1130 10:00:03.000000    7 remote_runtime.go:193] "StopContainer from runtime service failed" err="restart"`,
		`E1130 10:00:04.000000    7 kuberuntime_manager.go:9] "init" err="known"`,
		`W1130 10:00:05.000000    7 oom_linux.go:70] not the runtime`,
		`no header`,
	}
	var found []*line
	for _, s := range log {
		if l := parseLine(s, 2026); l != nil {
			found = append(found, l)
		}
	}
	if len(found) != 4 {
		t.Fatalf("%d warnings and errors, want 4", len(found))
	}
	at := func(sec int) time.Time { return time.Date(2026, 11, 30, 10, 0, sec, 0, time.Local) }
	expected, err := parseExpected("# comment\nkuberuntime_manager.*known  because\n")
	if err != nil {
		t.Fatal(err)
	}
	bad := judge(found, []Window{{at(2).Add(time.Millisecond), at(4)}}, expected)
	if len(bad) != 1 || !strings.Contains(bad[0], "RunPodSandbox") {
		t.Errorf("judged %q, want RunPodSandbox alone", bad)
	}
	if _, err := parseExpected("pattern"); err == nil {
		t.Error("an expectation without a reason is accepted")
	}
}

// FuzzParseLine: the kubelet's log holds what containers and registries say.
func FuzzParseLine(f *testing.F) {
	f.Add(`E1130 10:00:02.000000    7 remote_runtime.go:193] "x"`)
	f.Add(`W9999 99:99:99.999999 1 a.go:1] `)
	f.Fuzz(func(t *testing.T, s string) {
		if l := parseLine(s, 2026); l != nil && (l.file == "" || l.at.IsZero()) {
			t.Errorf("half a line: %+v", l)
		}
	})
}
