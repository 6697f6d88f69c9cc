package ring

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestFieldsDrop(t *testing.T) {
	full := &criv1.CreateContainerRequest{PodSandboxId: "p", Config: &criv1.ContainerConfig{
		Args: []string{"a"}, Labels: map[string]string{"a": "b"}, Mounts: []*criv1.Mount{{HostPath: "/a", Readonly: true}, {HostPath: "/b"}, {Readonly: true}},
	}}
	for field, c := range map[string]struct {
		hits   int64
		change func(*criv1.CreateContainerRequest)
	}{
		"CreateContainer.pod_sandbox_id": {1, func(r *criv1.CreateContainerRequest) { r.PodSandboxId = "" }},
		"CreateContainer.config.args":    {1, func(r *criv1.CreateContainerRequest) { r.Config.Args = nil }},
		"CreateContainer.config.labels":  {1, func(r *criv1.CreateContainerRequest) { r.Config.Labels = nil }},
		"CreateContainer.config.mounts[].host_path": {2, func(r *criv1.CreateContainerRequest) {
			r.Config.Mounts[0].HostPath, r.Config.Mounts[1].HostPath = "", ""
		}},
		"CreateContainer.config.tty":                               {0, nil},
		"CreateContainer.config.linux.security_context.privileged": {0, nil},
		"RunPodSandbox.config.labels":                              {0, nil},
	} {
		var d dropper
		a := d.arm(field)
		sent := proto.CloneOf(full)
		got, mutated := d.mutate("/runtime.v1.RuntimeService/CreateContainer", sent)
		wanted := proto.CloneOf(full)
		if c.change != nil {
			c.change(wanted)
		}
		if !proto.Equal(got.(proto.Message), wanted) || a.hits.Load() != c.hits || mutated != (c.hits > 0) {
			t.Errorf("%s: %d hits, %v", field, a.hits.Load(), got)
		}
		if !proto.Equal(sent, full) {
			t.Errorf("%s: the caller's own request was changed", field)
		}
	}
}

// TestFieldsProof: a check that does not depend on its field is found out.
func TestFieldsProof(t *testing.T) {
	n := StartNode(t)
	run := func(look func(testing.TB, *criv1.PodSandboxStatus)) func(testing.TB, *Node) {
		return func(t testing.TB, n *Node) {
			look(t, n.PodStatus(t, n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Labels = map[string]string{"a": "b"} })))
		}
	}
	blind := func(testing.TB, *criv1.PodSandboxStatus) {}
	for name, c := range map[string]struct {
		fieldCheck
		says string
	}{
		"good":       {fieldCheck{fields: under(podConfig, "labels"), run: run(func(t testing.TB, s *criv1.PodSandboxStatus) { want(t, "label", s.Labels["a"], "b") })}, ""},
		"blind":      {fieldCheck{fields: under(podConfig, "labels"), run: run(blind)}, "passes without"},
		"never sent": {fieldCheck{fields: under(podConfig, "annotations"), run: run(blind)}, "never sends"},
		"broken":     {fieldCheck{fields: under(podConfig, "labels"), run: run(func(t testing.TB, _ *criv1.PodSandboxStatus) { t.Fatal("broken") })}, "fails as it is: broken"},
		"skips":      {fieldCheck{fields: under(podConfig, "labels"), run: run(func(t testing.TB, _ *criv1.PodSandboxStatus) { t.Skip("not here") })}, "fails as it is: skipped"},
		"panics": {fieldCheck{fields: under(podConfig, "labels"), run: run(func(_ testing.TB, s *criv1.PodSandboxStatus) {
			if s.Labels == nil {
				panic("no labels")
			}
		})}, "panic: no labels"},
	} {
		r, p := &recorder{TB: t}, &fieldPlan{}
		r.run(func() { p.prove(r, n, &c.fieldCheck) })
		if r.Failed() != (c.says != "") || !strings.Contains(r.text(), c.says) {
			t.Errorf("%s: %q, want %q", name, r.text(), c.says)
		}
		if _, ok := p.fails.Load(c.fields[0]); ok != (c.says == "") {
			t.Errorf("%s: it counts as proof: %v", name, ok)
		}
	}
	if left := n.leftovers(); len(left) > 0 {
		t.Errorf("left by checks: %v", left)
	}
}

// TestFieldsTables: no exception may be superfluous, no path unknown.
func TestFieldsTables(t *testing.T) {
	list := []exception{{"A.b.*", "x"}, {"*.c", "y"}, {"A.b.d", "never"}}
	r := &recorder{TB: t}
	found, rest := match(r, list, []string{"A.b.c", "A.b.d", "A.c", "B.d"})
	if len(found) != 3 || found["A.b.c"].reason != "x" || found["A.c"].reason != "y" || strings.Join(rest, " ") != "B.d" || !strings.Contains(r.text(), "A.b.d") {
		t.Errorf("found %v, rest %v, said %q", found, rest, r.text())
	}
	for _, c := range []struct {
		checks []fieldCheck
		says   string
	}{
		{[]fieldCheck{{name: "x", fields: []string{"RunPodSandbox.no_such"}}}, "no request has"},
		{[]fieldCheck{{name: "x", fields: []string{"RunPodSandbox.runtime_handler"}}, {name: "y", fields: []string{"RunPodSandbox.runtime_handler"}}}, "both name"},
		{nil, "nobody checks RunPodSandbox.runtime_handler"},
	} {
		r := &recorder{TB: t}
		planFields(r, c.checks, nil)
		if !strings.Contains(r.text(), c.says) {
			t.Errorf("said %.200q, want %q", r.text(), c.says)
		}
	}
}
