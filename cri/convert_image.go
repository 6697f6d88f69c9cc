package cri

import (
	"encoding/json"
	"strconv"
	"strings"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/images"
)

// imageRef checks the name of an image in a request. Images are the same for
// all runtime handlers, yet api.proto wants an unknown one refused.
func (s *Server) imageRef(spec *criv1.ImageSpec) (string, error) {
	ref := spec.GetImage()
	if ref == "" {
		return "", invalid("image.image is empty")
	}
	if err := s.checkHandler(spec.GetRuntimeHandler()); err != nil {
		return "", err
	}
	return ref, checkLine("image.image", ref)
}

// auth converts credentials; nil or all empty means none.
func auth(a *criv1.AuthConfig) *images.Auth {
	out := images.Auth{
		Username:      a.GetUsername(),
		Password:      a.GetPassword(),
		Auth:          a.GetAuth(),
		ServerAddress: a.GetServerAddress(),
		IdentityToken: a.GetIdentityToken(),
		RegistryToken: a.GetRegistryToken(),
	}
	if out == (images.Auth{}) {
		return nil
	}
	return &out
}

func criImage(i *images.Image) *criv1.Image {
	uid, username := imageUser(i.Config.User)
	return &criv1.Image{
		Id:          i.ID,
		RepoTags:    i.RepoTags,
		RepoDigests: i.RepoDigests,
		Size:        i.Size,
		Uid:         uid,
		Username:    username,
		Spec:        &criv1.ImageSpec{Image: i.ID},
		Pinned:      i.Pinned,
	}
}

// imageUser splits USER of an image config ("user", "uid", "user:group", …)
// into what kubelet's runAsNonRoot looks at: a numeric user becomes the UID, any
// other the name. Both empty means root, so nothing but root may give that.
func imageUser(user string) (uid *criv1.Int64Value, username string) {
	name, _, _ := strings.Cut(user, ":")
	if name == "" {
		return nil, ""
	}
	if n, err := strconv.ParseUint(name, 10, 32); err == nil && n < 1<<32-1 {
		return &criv1.Int64Value{Value: int64(n)}, ""
	}
	return nil, name
}

// imageInfo is the verbose part of ImageStatus.
func imageInfo(i *images.Image) any {
	info := struct {
		ChainLayers []string        `json:"layers,omitempty"`
		ImageSpec   json.RawMessage `json:"imageSpec,omitempty"`
	}{}
	for _, d := range i.Layers {
		info.ChainLayers = append(info.ChainLayers, d.String())
	}
	if json.Valid(i.RawConfig) {
		info.ImageSpec = i.RawConfig
	}
	return info
}

func criFsUsage(f images.FsInfo) *criv1.FilesystemUsage {
	return &criv1.FilesystemUsage{
		Timestamp:  nanos(f.Time),
		FsId:       &criv1.FilesystemIdentifier{Mountpoint: f.Mountpoint},
		UsedBytes:  u64(f.Bytes),
		InodesUsed: u64(f.Inodes),
	}
}

func u64(v uint64) *criv1.UInt64Value { return &criv1.UInt64Value{Value: v} }
