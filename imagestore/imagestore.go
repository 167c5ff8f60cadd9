// Package imagestore pulls images and keeps each as one read-only EROFS file.
package imagestore

import (
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is one image in the store. It does not change after it was handed out.
type Image struct {
	// ID is the digest of its configuration, "sha256:..."; the EROFS file is named by it.
	ID string
	// Tags ("docker.io/library/busybox:1.36") and Digests ("docker.io/library/busybox@sha256:...").
	Tags, Digests []string
	// Size is what its file takes on the disk, in bytes.
	Size int64
	// Config is the image's own configuration; Raw the bytes of it.
	Config ocispec.Image
	Raw    []byte `json:"-"`
	Pulled time.Time
	// Pinned images are never collected as garbage.
	Pinned bool
}

// Auth is what a registry asks for. At most one of Password, Auth, IdentityToken, RegistryToken is set.
type Auth struct {
	Username, Password string
	// Auth is base64 of "username:password".
	Auth          string
	ServerAddress string
	IdentityToken string
	RegistryToken string
}
