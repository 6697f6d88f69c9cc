package ring

import (
	"encoding/json"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// artifact puts an artifact into the registry: title and content of each file,
// in turn.
func (r *lyingRegistry) artifact(repo string, files ...string) (ref, digest string) {
	const kind = "application/vnd.oci.image.manifest.v1+json"
	m := map[string]any{"schemaVersion": 2, "mediaType": kind, "artifactType": "application/vnd.ring.model",
		"config": map[string]any{"mediaType": "application/vnd.oci.empty.v1+json", "digest": digestOf([]byte("{}")), "size": 2}}
	var layers []any
	for i := 0; i < len(files); i += 2 {
		b := []byte(files[i+1])
		layers = append(layers, map[string]any{"mediaType": "application/x-any", "digest": digestOf(b), "size": len(b),
			"annotations": map[string]string{"org.opencontainers.image.title": files[i]}})
		r.answers["/v2/"+repo+"/blobs/"+digestOf(b)] = b
	}
	m["layers"] = layers
	manifest := must(json.Marshal(m))
	for _, name := range []string{"1", digestOf(manifest)} {
		r.answers["/v2/"+repo+"/manifests/"+name], r.types["/v2/"+repo+"/manifests/"+name] = manifest, kind
	}
	return r.host() + "/" + repo + ":1", digestOf(manifest)
}

func TestArtifactVolumes(t *testing.T) {
	n := StartNode(t)
	r := newLyingRegistry(t)
	pull := func(ref string) (string, error) {
		a, err := n.Images.PullImage(within(t, callTime), &criv1.PullImageRequest{Image: &criv1.ImageSpec{Image: ref}})
		return a.GetImageRef(), err
	}
	ref, digest := r.artifact("ai/model", "weights.bin", "www\n", "conf/a.json", "{}\n", "conf/b.json", "[]\n", "run.sh", "#!/bin/sh\necho ran\n")
	id, err := pull(ref)
	if err != nil || id != digest {
		t.Fatalf("pull: %q %v, want %s", id, err, digest)
	}
	st, err := n.Images.ImageStatus(within(t, callTime), &criv1.ImageStatusRequest{Image: &criv1.ImageSpec{Image: ref}, Verbose: true})
	if err != nil || st.Image.GetId() != digest || len(st.Image.RepoTags) != 1 || !strings.HasSuffix(st.Image.RepoDigests[0], "@"+digest) || !strings.Contains(st.Info["info"], "vnd.ring.model") {
		t.Errorf("status %v %v", st, err)
	}
	volume := func(path, sub string) *criv1.Mount {
		return &criv1.Mount{ContainerPath: path, Image: &criv1.ImageSpec{Image: ref}, ImageSubPath: sub}
	}
	pod := n.Pod(t, nil)
	c := n.Run(t, pod, mounts(volume("/m", ""), volume("/conf", "conf"), volume("/etc/one.json", "conf/a.json")))
	t.Run("files", func(t *testing.T) {
		out := n.Sh(t, c, "cd /m && find . -type f | sort && cat weights.bin conf/a.json /conf/b.json /etc/one.json && sh ./run.sh")
		if want := "./conf/a.json\n./conf/b.json\n./run.sh\n./weights.bin\nwww\n{}\n[]\n{}\nran"; out != want {
			t.Errorf("got %q, want %q", out, want)
		}
		for _, p := range []string{"/m/new", "/m/weights.bin", "/conf/new", "/etc/one.json"} {
			n.fails(t, c, "echo x >"+p, "Read-only")
		}
		if m := n.Status(t, c).Mounts; len(m) != 3 || m[0].Image.GetImageRef() != digest || !m[0].Readonly {
			t.Errorf("status says %v", m)
		}
	})
	t.Run("user namespace", func(t *testing.T) {
		ids := []*criv1.IDMapping{{HostId: 400000, ContainerId: 0, Length: 65536}}
		pod := n.Pod(t, namespaces(func(o *criv1.NamespaceOption) {
			o.UsernsOptions = &criv1.UserNamespace{Mode: criv1.NamespaceMode_POD, Uids: ids, Gids: ids}
		}))
		id := n.Run(t, pod, mounts(volume("/m", ""), volume("/etc/one.json", "conf/a.json")))
		if out := n.Sh(t, id, "cat /m/weights.bin /etc/one.json; stat -c %u /m/weights.bin"); out != "www\n{}\n0" {
			t.Errorf("got %q", out)
		}
	})
	t.Run("refused", func(t *testing.T) {
		_, err := n.TryContainer(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = ref })
		wantError(t, err, codes.InvalidArgument, `is an artifact of type "application/vnd.ring.model"`)
		_, err = n.TryContainer(t, pod, mounts(volume("/m", "nothing/here")))
		wantError(t, err, codes.NotFound, "ImageVolumeMountFailed", "nothing/here")
		for _, title := range []string{"../canary", "/canary", "a/../../canary"} {
			bad, _ := r.artifact("ai/bad", title, "x")
			_, err := pull(bad)
			wantError(t, err, codes.FailedPrecondition, title)
		}
	})
	t.Run("removed while it is used", func(t *testing.T) {
		if _, err := n.Images.RemoveImage(within(t, callTime), &criv1.RemoveImageRequest{Image: &criv1.ImageSpec{Image: id}}); err != nil {
			t.Fatal(err)
		}
		n.RestartDaemon()
		if out := n.Sh(t, c, "cat /m/weights.bin"); out != "www" {
			t.Errorf("got %q", out)
		}
		_, err := n.TryContainer(t, pod, mounts(volume("/m", "")))
		wantError(t, err, codes.NotFound, "ImageVolumeMountFailed")
	})
}
