package ring

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func imageChecks() []fieldCheck {
	status := func(n *Node, t testing.TB, i *criv1.ImageSpec) (*criv1.ImageStatusResponse, error) {
		return n.Images.ImageStatus(within(t, callTime), &criv1.ImageStatusRequest{Image: i, Verbose: true})
	}
	remove := func(n *Node, t testing.TB, i *criv1.ImageSpec) error {
		_, err := n.Images.RemoveImage(within(t, callTime), &criv1.RemoveImageRequest{Image: i})
		return err
	}
	const unknown = "no-such-handler"
	return append([]fieldCheck{
		{"status of an image", "the answer; that an unknown runtime handler is refused", under("ImageStatus", "image.image", "image.runtime_handler", "verbose"), func(t testing.TB, n *Node) {
			r, err := status(n, t, &criv1.ImageSpec{Image: Busybox})
			if err != nil || r.Image.GetId() == "" || r.Info["info"] == "" {
				t.Errorf("got %v, %v", r, err)
			}
			_, err = status(n, t, &criv1.ImageSpec{Image: Busybox, RuntimeHandler: unknown})
			wantError(t, err, codes.InvalidArgument, unknown)
		}},
		{"removal of an image", "ImageStatus; that an unknown runtime handler is refused", under("RemoveImage.image", "image", "runtime_handler"), func(t testing.TB, n *Node) {
			image := n.Image(t, ImageConfig{}, File("mark", 0o644, newID()))
			wantError(t, remove(n, t, &criv1.ImageSpec{Image: image, RuntimeHandler: unknown}), codes.InvalidArgument, unknown)
			want(t, "error", remove(n, t, &criv1.ImageSpec{Image: image}), nil)
			if r, err := status(n, t, &criv1.ImageSpec{Image: image}); err != nil || r.Image != nil {
				t.Errorf("after it was removed: %v, %v", r, err)
			}
		}},
		{"pull", "ImageStatus; that an unknown runtime handler is refused", under("PullImage.image", "image", "runtime_handler"), func(t testing.TB, n *Node) {
			ref, _ := newLyingRegistry(t).image("open", nil)
			_, err := n.pull(t, &criv1.ImageSpec{Image: ref, RuntimeHandler: unknown}, nil)
			wantError(t, err, codes.InvalidArgument, unknown)
			id, err := n.pull(t, &criv1.ImageSpec{Image: ref}, nil)
			if err != nil {
				t.Fatal(err)
			}
			r, err := status(n, t, &criv1.ImageSpec{Image: ref})
			if err != nil || r.Image.GetId() != id {
				t.Errorf("%v, %v, want %s", r, err, id)
			}
		}},
	}, credentialChecks()...)
}

func (n *Node) pull(t testing.TB, i *criv1.ImageSpec, a *criv1.AuthConfig) (string, error) {
	t.Helper()
	r, err := n.Images.PullImage(within(t, callTime), &criv1.PullImageRequest{Image: i, Auth: a})
	return r.GetImageRef(), err
}

const (
	fieldUser, fieldPassword = "field-user", "field-password"
	fieldToken               = "field-token"
)

// closedRegistry wants each request to have that Authorization, and gives a
// challenge else. Its token server gives the token for the refresh token.
func closedRegistry(t testing.TB, authorization, challenge string) *lyingRegistry {
	r := newLyingRegistry(t)
	r.guard = func(w http.ResponseWriter, q *http.Request) bool {
		if q.URL.Path == "/token" {
			if q.FormValue("grant_type") == "refresh_token" && q.FormValue("refresh_token") == "identity" {
				_, _ = fmt.Fprintf(w, `{"access_token": %q}`, fieldToken)
			} else {
				w.WriteHeader(http.StatusUnauthorized)
			}
			return false
		}
		if q.Header.Get("Authorization") == authorization {
			return true
		}
		w.Header().Set("WWW-Authenticate", strings.ReplaceAll(challenge, "URL", r.URL))
		w.WriteHeader(http.StatusUnauthorized)
		return false
	}
	return r
}

func credentialChecks() []fieldCheck {
	encoded := base64.StdEncoding.EncodeToString([]byte(fieldUser + ":" + fieldPassword))
	const basic, bearer = `Basic realm="x"`, `Bearer realm="URL/token",service="x"`
	accepted := func(authorization, challenge string, a *criv1.AuthConfig) func(testing.TB, *Node) {
		return func(t testing.TB, n *Node) {
			ref, _ := closedRegistry(t, authorization, challenge).image("closed", nil)
			_, err := n.pull(t, &criv1.ImageSpec{Image: ref}, a)
			want(t, "error", err, nil)
		}
	}
	const sees = "a registry that wants it"
	return []fieldCheck{
		{"user and password", sees, under("PullImage.auth", "username", "password"), accepted("Basic "+encoded, basic, &criv1.AuthConfig{Username: fieldUser, Password: fieldPassword})},
		{"user and password in one", sees, under("PullImage.auth", "auth"), accepted("Basic "+encoded, basic, &criv1.AuthConfig{Auth: encoded})},
		{"registry token", sees, under("PullImage.auth", "registry_token"), accepted("Bearer "+fieldToken, bearer, &criv1.AuthConfig{RegistryToken: fieldToken})},
		{"identity token", sees, under("PullImage.auth", "identity_token"), accepted("Bearer "+fieldToken, bearer, &criv1.AuthConfig{IdentityToken: "identity"})},
		{"server of credentials", "that another registry does not get them", under("PullImage.auth", "server_address"), func(t testing.TB, n *Node) {
			ref, _ := closedRegistry(t, "Basic "+encoded, basic).image("closed", nil)
			_, err := n.pull(t, &criv1.ImageSpec{Image: ref}, &criv1.AuthConfig{Username: fieldUser, Password: fieldPassword, ServerAddress: "registry.example"})
			if err == nil {
				t.Error("credentials for another server were sent")
			}
		}},
	}
}
