package ring

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// lyingRegistry serves what it is given, true or not, by path.
type lyingRegistry struct {
	*httptest.Server
	answers map[string][]byte
	types   map[string]string
	guard   func(http.ResponseWriter, *http.Request) bool // lets requests in; nil = all
}

func newLyingRegistry(t testing.TB) *lyingRegistry {
	r := &lyingRegistry{answers: map[string][]byte{}, types: map[string]string{}}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if r.guard != nil && !r.guard(w, q) {
			return
		}
		b, ok := r.answers[q.URL.Path]
		if !ok {
			http.NotFound(w, q)
			return
		}
		if kind := r.types[q.URL.Path]; kind != "" {
			w.Header().Set("Content-Type", kind)
		}
		_, _ = w.Write(b)
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *lyingRegistry) host() string { return strings.TrimPrefix(r.URL, "http://") }

// image puts an image into the registry; change may make it a lie.
func (r *lyingRegistry) image(repo string, change func(config, layer *[]byte, m map[string]any)) (ref, digest string) {
	layer := tarball([]Entry{File("hello", 0o644, repo)})
	config := must(json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Cmd": []string{"/hello"}}, "rootfs": map[string]any{"type": "layers", "diff_ids": []string{digestOf(layer)}},
	}))
	descriptor := func(kind string, b []byte) map[string]any {
		return map[string]any{"mediaType": "application/vnd.oci.image." + kind, "digest": digestOf(b), "size": len(b)}
	}
	const kind = "application/vnd.oci.image.manifest.v1+json"
	m := map[string]any{"schemaVersion": 2, "mediaType": kind, "config": descriptor("config.v1+json", config), "layers": []any{descriptor("layer.v1.tar", layer)}}
	blobs := []string{digestOf(config), digestOf(layer)}
	if change != nil {
		change(&config, &layer, m)
	}
	manifest := must(json.Marshal(m))
	for i, b := range [][]byte{config, layer} {
		r.answers["/v2/"+repo+"/blobs/"+blobs[i]] = b
	}
	for _, name := range []string{"1", digestOf(manifest)} {
		r.answers["/v2/"+repo+"/manifests/"+name], r.types["/v2/"+repo+"/manifests/"+name] = manifest, kind
	}
	return r.host() + "/" + repo + ":1", digestOf(manifest)
}

func TestInputPull(t *testing.T) {
	n := StartNode(t)
	r := newLyingRegistry(t)
	pull := func(ref string) (string, error) {
		a, err := n.Images.PullImage(within(t, callTime), &criv1.PullImageRequest{Image: &criv1.ImageSpec{Image: ref}})
		return a.GetImageRef(), err
	}
	t.Run("an honest image", func(t *testing.T) {
		ref, digest := r.image("honest", nil)
		id, err := pull(ref)
		if err != nil {
			t.Fatal(err)
		}
		again, err := pull(r.host() + "/honest@" + digest)
		if err != nil || again != id {
			t.Errorf("by digest: %s, %v; want %s", again, err, id)
		}
		if both, err := pull(ref + "@" + digest); err != nil || both != id {
			t.Errorf("by tag and digest: %s, %v; want %s", both, err, id)
		}
	})
	t.Run("nobody listens", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		_ = l.Close()
		_, err = pull(addr + "/x/y:1")
		wantError(t, err, codes.Unavailable, addr)
		if !strings.HasPrefix(messageOf(err), "RegistryUnavailable") {
			t.Errorf("kubelet looks for RegistryUnavailable at the beginning of %q", messageOf(err))
		}
	})
	t.Run("a name that leads nowhere", func(t *testing.T) {
		_, err := pull("registry.invalid/x/y:1")
		wantError(t, err, codes.Unavailable)
		if !strings.HasPrefix(messageOf(err), "RegistryUnavailable") {
			t.Errorf("got %q", messageOf(err))
		}
	})
	t.Run("no such image", func(t *testing.T) {
		_, err := pull(r.host() + "/nobody/has:it")
		wantError(t, err, codes.NotFound, "nobody/has:it")
	})
	t.Run("another manifest than the digest says", func(t *testing.T) {
		_, _ = r.image("swapped", nil)
		wrong := "sha256:" + strings.Repeat("5", 64)
		r.answers["/v2/swapped/manifests/"+wrong], r.types["/v2/swapped/manifests/"+wrong] = r.answers["/v2/swapped/manifests/1"], r.types["/v2/swapped/manifests/1"]
		_, err := pull(r.host() + "/swapped@" + wrong)
		wantError(t, err, codes.FailedPrecondition, "digest", wrong[:20])
	})
	for name, change := range map[string]func(config, layer *[]byte, m map[string]any){
		"config": func(c, _ *[]byte, _ map[string]any) { *c = []byte(strings.Replace(string(*c), "linux", "linuX", 1)) },
		"layer":  func(_, l *[]byte, _ map[string]any) { (*l)[600] ^= 1 },
		"short":  func(_, l *[]byte, _ map[string]any) { *l = (*l)[:700] },
	} {
		t.Run("a wrong blob: "+name, func(t *testing.T) {
			ref, _ := r.image("wrong-"+name, change)
			_, err := pull(ref)
			if c := codeOf(err); c != codes.FailedPrecondition && c != codes.Unavailable || !strings.Contains(err.Error(), "digest") && !strings.Contains(err.Error(), "bytes") && !strings.Contains(err.Error(), "EOF") {
				t.Errorf("got %v", err)
			}
			if s, err := n.Images.ImageStatus(within(t, callTime), &criv1.ImageStatusRequest{Image: &criv1.ImageSpec{Image: ref}}); err != nil || s.Image != nil {
				t.Errorf("the image is there: %v, %v", s, err)
			}
		})
	}
	t.Run("a layer that is not what the config says", func(t *testing.T) {
		other := tarball([]Entry{File("other", 0o644, "x")})
		r.answers["/v2/wrong-diff/blobs/"+digestOf(other)] = other
		ref, _ := r.image("wrong-diff", func(_, _ *[]byte, m map[string]any) {
			m["layers"] = []any{map[string]any{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digestOf(other), "size": len(other)}}
		})
		_, err := pull(ref)
		if c := codeOf(err); c != codes.FailedPrecondition && c != codes.InvalidArgument {
			t.Errorf("got %v", err)
		}
	})
	t.Run("names", func(t *testing.T) {
		for _, ref := range []string{"Upper/Case:1", "../x", "a b", "x:y:z", "x@sha256:1234", strings.Repeat("a/", 300) + "x"} {
			if _, err := pull(ref); codeOf(err) != codes.InvalidArgument {
				t.Errorf("pull of %.40q: %v", ref, err)
			}
		}
	})
	t.Run("a registry that says nothing", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
		began := time.Now()
		ctx := within(t, time.Second)
		_, err = n.Images.PullImage(ctx, &criv1.PullImageRequest{Image: &criv1.ImageSpec{Image: l.Addr().String() + "/x:1"}})
		wantError(t, err, codes.DeadlineExceeded)
		if took := time.Since(began); took > testhost.Limit(5*time.Second) {
			t.Errorf("it took %v", took)
		}
	})
	t.Run("an image that is not here", func(t *testing.T) {
		_, err := n.TryContainer(t, n.Pod(t, nil), func(c *criv1.ContainerConfig) { c.Image.Image = fmt.Sprintf("%s/absent:1", r.host()) })
		wantError(t, err, codes.NotFound, "absent:1", "pull")
	})
}
