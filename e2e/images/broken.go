package images

import (
	"context"
	"fmt"
	"math/rand/v2"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The references of the project's own images.
const (
	Busybox = "docker.io/library/busybox:1.35"
	Nginx   = "docker.io/library/nginx:1.22"
	Torture = "docker.io/caisson/torture:1"
	// Stateful declares the volumes /seeded, which holds a file, /made, which is not there, and /mounted.
	Stateful = "docker.io/caisson/stateful:1"
	// Private is busybox in a registry that wants a password.
	Private = "private.test/caisson/private:1"
	// Large has a layer of LargeBytes that do not compress; tests also break its transfer.
	Large = "docker.io/caisson/large:1"
	// Garbage has a layer that is no archive, and WrongDiffID one that is not what the
	// configuration says.
	Garbage     = "docker.io/caisson/garbage:1"
	WrongDiffID = "docker.io/caisson/wrong-diffid:1"
)

// LargeBytes is the size of what makes Large large.
const LargeBytes = 48 << 20

// broken are the images for bad input.
func broken(_ context.Context, _ string, b *base) ([]Image, error) {
	private, err := b.with(busybox(), new(Layer).File("private", 0o600, "secret\n"))
	if err != nil {
		return nil, err
	}
	noise := make([]byte, LargeBytes)
	// The same noise on every build.
	if _, err := rand.NewChaCha8([32]byte{}).Read(noise); err != nil {
		return nil, fmt.Errorf("image %s: %w", Large, err)
	}
	large, err := b.with(busybox(), new(Layer).File("noise", 0o644, string(noise)))
	if err != nil {
		return nil, err
	}
	junk, err := layerOf(noise[:1<<20], compression.GZip)
	if err != nil {
		return nil, err
	}
	garbage, err := image(busybox(), types.OCIManifestSchema1, b.layer, junk)
	if err != nil {
		return nil, err
	}
	wrong, err := wrongDiffID(b)
	if err != nil {
		return nil, err
	}
	return []Image{
		{Refs: []string{Private}, Single: private},
		{Refs: []string{Large}, Single: large},
		{Refs: []string{Garbage}, Single: garbage},
		{Refs: []string{WrongDiffID}, Single: wrong},
	}, nil
}

// wrongDiffID is an image whose configuration lies about its second layer.
func wrongDiffID(b *base) (v1.Image, error) {
	honest, err := b.with(busybox(), new(Layer).File("honest", 0o644, "no\n"))
	if err != nil {
		return nil, err
	}
	file, err := honest.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.RootFS.DiffIDs[1] = file.RootFS.DiffIDs[0]
	return mutate.ConfigFile(honest, file)
}
