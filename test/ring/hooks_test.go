package ring

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// noteHook writes down its stage, the container's state and the pod's annotation.
const noteHook = `#!/bin/sh
state=$(cat)
id=${state##*\"id\":\"}; id=${id%%\"*}
status=${state##*\"status\":\"}; status=${status%%\"*}
echo "$1 $id $status $NOTE" >>NOTES
`

// TestHooks: hooks of a folder, for containers of either kind.
func TestHooks(t *testing.T) {
	for name, failure := range map[string]codes.Code{"native": codes.FailedPrecondition, "oci": codes.Internal} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "hooks.d")
			notes := filepath.Join(t.TempDir(), "notes")
			put := func(name, text string, mode os.FileMode) {
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, []byte(text), mode); err != nil {
					t.Fatal(err)
				}
			}
			put(dir+"/note", strings.ReplaceAll(noteHook, "NOTES", notes), 0o755)
			for _, stage := range []string{"prestart", "createRuntime", "poststart", "poststop"} {
				put(dir+"/"+stage+".json", fmt.Sprintf(`{"version": "1.0.0", "hook": {"path": "%s/note", "args": ["note", %q], "env": ["NOTE=mine"]},
					"when": {"annotations": {"^io\\.example/note$": "^yes$"}}, "stages": [%q]}`, dir, stage, stage), 0o644)
			}
			put(dir+"/inside.json", `{"version": "1.0.0", "hook": {"path": "/bin/sh", "args": ["sh", "-c", "cat >/inside"]},
				"when": {"annotations": {"^io\\.example/note$": "^yes$"}, "commands": ["sh$"]}, "stages": ["startContainer"]}`, 0o644)
			opts := []Option{WithConfig(fmt.Sprintf("runtime.hook_dirs = [%q]", dir))}
			if name == "oci" {
				opts = append(opts, WithRuntime(runc(t)))
			}
			n := StartNode(t, opts...)
			pod := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Annotations = map[string]string{"io.example/note": "yes"} })
			id := n.Container(t, pod, shell("cat /inside; echo; exec sleep 1000"))
			n.KillDaemon() // what is due later is remembered
			n.StartDaemon()
			n.Start(t, id)
			n.awaitLog(t, id, id)
			n.Remove(t, id)
			text, err := os.ReadFile(notes)
			if err != nil {
				t.Fatal(err)
			}
			var stages []string
			for l := range strings.Lines(string(text)) {
				f := strings.Fields(l)
				if len(f) != 4 || f[1] != id || f[3] != "mine" {
					t.Errorf("line %q", l)
					continue
				}
				if name == "oci" && f[0] == "poststart" {
					f[2] = "running" // runc 1.1 tells what was before the start
				}
				stages = append(stages, f[0]+" "+f[2])
			}
			if got, want := strings.Join(stages, ", "), "prestart creating, createRuntime creating, poststart running, poststop stopped"; got != want {
				t.Errorf("hooks ran: %s; want %s", got, want)
			}
			// A pod without the annotation has none.
			if err := os.Remove(notes); err != nil {
				t.Fatal(err)
			}
			n.Remove(t, n.Run(t, n.Pod(t, nil), nil))
			if _, err := os.Stat(notes); !os.IsNotExist(err) {
				t.Errorf("hooks ran where they must not: %v", err)
			}
			put(dir+"/fails.json", `{"version": "1.0.0", "hook": {"path": "/bin/false"}, "when": {"always": true}, "stages": ["createRuntime"]}`, 0o644)
			_, err = n.TryContainer(t, pod, nil)
			wantError(t, err, failure, "hook")
			put(dir+"/fails.json", `{"version": "1.0.0", "hook": {"path": "/bin/true"}, "wenn": {}}`, 0o644)
			_, err = n.TryContainer(t, pod, nil)
			wantError(t, err, codes.FailedPrecondition, "fails.json", "wenn")
		})
	}
}
