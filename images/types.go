// Package images gets images from registries and archives, verifies every
// byte, unpacks each layer into a folder of its own and answers what the node
// has. It also makes and removes the writable folders of containers and counts
// what they use.
//
// Nothing in an image is trusted: names, links, sizes, modes and JSON all come
// from strangers. It must not know about pods or CRI.
//
// Concurrency: all methods of Store may be called concurrently; List and
// Status are served from memory and never wait for IO.
package images

import (
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is one image of the node: an immutable snapshot, safe to share.
type Image struct {
	ID          string              // config digest, "sha256:…"
	RepoTags    []string            // normalised, e.g. docker.io/library/nginx:1.27
	RepoDigests []string            // repo@sha256:…
	Size        uint64              // bytes of the unpacked layers and the config
	Config      ocispec.ImageConfig // entrypoint, env, user, …
	RawConfig   []byte              // the config blob as verified
	Layers      []digest.Digest     // diff IDs, base first
	Pinned      bool
	Created     time.Time
	// Artifact is the type of an artifact, empty for an image. An artifact's ID
	// is the digest of its manifest, which is its RawConfig; Layers are the
	// digests of its files. It can be a volume, and no container's root.
	Artifact string
}

// Auth is how to authenticate at a registry (CRI AuthConfig). At most one form
// is used: RegistryToken, IdentityToken, Username+Password; Auth is base64
// "user:password". Never logged.
type Auth struct {
	Username, Password, Auth     string
	ServerAddress                string
	IdentityToken, RegistryToken string
}

// Writable are the folders that overlayfs needs for a container beside the
// layers of its image: upper and work on one file system.
type Writable struct {
	Upper, Work string
	// Places is a layer to go below all others: the mount points that every
	// container needs.
	Places string
}

// Usage of a folder tree or file system.
type Usage struct {
	Bytes, Inodes uint64
	Time          time.Time
}

// Disk is a file system as a whole. One that has no fixed number of inodes
// (btrfs) says 0.
type Disk struct {
	Device             string // as mounted: /dev/sda1
	Bytes              uint64
	Inodes, InodesFree uint64
	Time               time.Time
}

// FsInfo is the usage of the file system that images live on.
type FsInfo struct {
	Mountpoint string
	Usage
}
