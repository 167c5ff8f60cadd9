// Package imagestore pulls images and keeps each as one read-only EROFS file.
//
// An image is named by the digest of its configuration. Its file <root>/<hex>.erofs is made once,
// in a staging directory, and gets its name when it is complete and synced; the record
// <root>/<hex>.json beside it, written last, is what makes it part of the store. Pods hold the file
// by a hard link (Store.Link), so that an image which is removed lives on until its last pod goes.
package imagestore

import (
	"errors"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrRejected is in the chain of an error that says that the signature policy forbids an image.
var ErrRejected = errors.New("rejected by the signature policy")

// Image is one image in the store. It does not change after it was handed out.
type Image struct {
	// ID is the digest of its configuration, "sha256:..."; the EROFS file is named by it.
	ID string
	// Tags ("docker.io/library/busybox:1.36") and Digests ("docker.io/library/busybox@sha256:..."),
	// sorted. Tags move to the image that was pulled by them last; an image may have none.
	Tags, Digests []string
	// Size is what its file takes on the disk, in bytes.
	Size int64
	// Config is what a container is started with: User, WorkingDir, StopSignal, Env, Entrypoint, Cmd and Volumes
	// of the image's own configuration. Store.Config has all of that.
	Config ocispec.Image
	Pulled time.Time
	// Pinned images are never collected as garbage.
	Pinned bool
}

// Auth is what a registry asks for. At most one of Password, Auth, IdentityToken, RegistryToken is set.
type Auth struct {
	Username, Password string
	// Auth is base64 of "username:password".
	Auth string
	// ServerAddress is the registry that they are for, also as a URL; no other is given them. "": any.
	ServerAddress string
	IdentityToken string
	RegistryToken string
}

// Options say where a store is and how it pulls.
type Options struct {
	// Root is the store's directory; it is made when missing. Pods' directories must be on the
	// same file system, for Link.
	Root string
	// Puller is the program, with its arguments, that calls ServePull: one runs for each pull, and without it
	// there are none.
	Puller []string
	// Pinned are the names of images that must not be collected as garbage.
	Pinned []string
	// PullProgressTimeout ends a pull that receives nothing for so long; 0: one minute.
	PullProgressTimeout time.Duration
	// RegistriesConf is a containers-registries.conf(5), read for every pull, with RegistriesConf+".d"
	// beside it. Empty: the system's, in /etc/containers.
	RegistriesConf string
	// Policy is a containers-policy.json(5), read for every pull. Empty: /etc/containers/policy.json,
	// and where that is missing, unsigned images are accepted.
	Policy string
	// AuthFile is a containers-auth.json(5), used for pulls without credentials.
	// Empty: /etc/containers/auth.json; it may be missing.
	AuthFile string
	// Pulled, if set, is told of each pull that ended.
	Pulled func(PullResult)
}

// PullResult is how a pull ended, for metrics.
type PullResult struct {
	// Ref is the full name that was pulled.
	Ref string
	// Err is nil if it succeeded. Cached tells that all but the manifest was there already.
	Err    error
	Cached bool
	// Downloaded are the bytes of layers received; Unpacked those of layers after decompression.
	Downloaded, Unpacked int64
	Took                 time.Duration
}

// Usage is what the store takes of its disk.
type Usage struct {
	// Path is the store's directory.
	Path string
	// Bytes are allocated blocks, not lengths of files.
	Bytes, Inodes uint64
	Time          time.Time
}
