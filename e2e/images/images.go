// Package images assembles the OCI images that the end-to-end tests, the demo and critest run:
// real programs out of Debian's packages, layered as real images are, under the names by which
// they are known. Nothing comes from a public registry.
package images

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// refName is the annotation under which an OCI layout keeps an image's reference.
const refName = "org.opencontainers.image.ref.name"

// Image is one image, or an index of images, and the references by which it is pulled.
type Image struct {
	Refs []string
	// Single is the image for this machine. Index, where set, is what the references lead to: an
	// index that names Single beside images of other platforms.
	Single v1.Image
	Index  v1.ImageIndex
}

// Build assembles all images and writes them to dir as an OCI layout, replacing what is there.
// It downloads Debian packages with apt-get and keeps them in cache; a package that is in cache is
// not downloaded again.
func Build(ctx context.Context, dir, cache string) error {
	root, err := os.MkdirTemp("", "caisson-images-")
	if err != nil {
		return fmt.Errorf("build images: %w", err)
	}
	defer os.RemoveAll(root)
	if err := unpack(ctx, cache, root, packages...); err != nil {
		return err
	}
	all, err := assemble(ctx, root)
	if err != nil {
		return err
	}
	return write(all, dir)
}

// assemble makes every image from the unpacked packages in root.
func assemble(ctx context.Context, root string) ([]Image, error) {
	b, err := newBase(root)
	if err != nil {
		return nil, err
	}
	var all []Image
	for _, part := range []func(context.Context, string, *base) ([]Image, error){servers, critest, torture, broken} {
		images, err := part(ctx, root, b)
		if err != nil {
			return nil, err
		}
		all = append(all, images...)
	}
	return all, nil
}

// write stores the images in a fresh layout and puts it in dir's place.
func write(all []Image, dir string) error {
	fresh := dir + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return fmt.Errorf("write images: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("write images: %w", err)
	}
	path, err := layout.Write(fresh, empty.Index)
	if err != nil {
		return fmt.Errorf("write images to %s: %w", fresh, err)
	}
	for _, image := range all {
		for _, ref := range image.Refs {
			if err := appendTo(path, image, ref); err != nil {
				return fmt.Errorf("write image %s: %w", ref, err)
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("write images: %w", err)
	}
	return os.Rename(fresh, dir)
}

func appendTo(path layout.Path, image Image, ref string) error {
	named := layout.WithAnnotations(map[string]string{refName: ref})
	if image.Index != nil {
		return path.AppendIndex(image.Index, named)
	}
	return path.AppendImage(image.Single, named)
}

// Read opens the layout that Build wrote. It fails with a hint when there is none.
func Read(dir string) ([]Image, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("no images in %s, run go run ./e2e/prepare first: %w", dir, err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("read images in %s: %w", dir, err)
	}
	var all []Image
	for _, d := range manifest.Manifests {
		image := Image{Refs: []string{d.Annotations[refName]}}
		if d.MediaType.IsIndex() {
			image.Index, err = index.ImageIndex(d.Digest)
		} else {
			image.Single, err = index.Image(d.Digest)
		}
		if err != nil {
			return nil, fmt.Errorf("read image %s: %w", d.Annotations[refName], err)
		}
		all = append(all, image)
	}
	return all, nil
}

// Push uploads the image to the registry at addr (host:port) under each of its references, with
// the reference's own registry as the first part of the repository's name.
func (i Image) Push(ctx context.Context, addr string) error {
	for _, text := range i.Refs {
		ref, err := name.ParseReference(text)
		if err != nil {
			return fmt.Errorf("push %s: %w", text, err)
		}
		repo, err := name.NewRepository(addr+"/"+Repository(ref), name.Insecure)
		if err != nil {
			return fmt.Errorf("push %s: %w", text, err)
		}
		to := repo.Tag(ref.Identifier())
		options := []remote.Option{remote.WithContext(ctx), remote.WithJobs(4)}
		if i.Index != nil {
			err = remote.WriteIndex(to, i.Index, options...)
		} else {
			err = remote.Write(to, i.Single, options...)
		}
		if err != nil {
			return fmt.Errorf("push %s: %w", text, err)
		}
	}
	return nil
}

// Repository is where the mirror keeps an image: its registry, as users write it, and its path.
func Repository(ref name.Reference) string {
	registry := ref.Context().RegistryStr()
	if registry == name.DefaultRegistry {
		registry = "docker.io"
	}
	return registry + "/" + ref.Context().RepositoryStr()
}

// image stacks layers under a configuration, in Docker's media types or OCI's.
func image(config v1.Config, kind types.MediaType, layers ...v1.Layer) (v1.Image, error) {
	from := mutate.MediaType(empty.Image, kind)
	configKind := types.OCIConfigJSON
	if kind == types.DockerManifestSchema2 {
		configKind = types.DockerConfigJSON
	}
	from = mutate.ConfigMediaType(from, configKind)
	var adds []mutate.Addendum
	for _, layer := range layers {
		add := mutate.Addendum{Layer: layer}
		if kind == types.DockerManifestSchema2 {
			add.MediaType = types.DockerLayer
		}
		adds = append(adds, add)
	}
	image, err := mutate.Append(from, adds...)
	if err != nil {
		return nil, fmt.Errorf("stack layers: %w", err)
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("stack layers: %w", err)
	}
	file = file.DeepCopy()
	file.Architecture, file.OS = "amd64", "linux"
	file.Created = v1.Time{Time: epoch}
	file.Config = config
	return mutate.ConfigFile(image, file)
}

// index names the image beside one of another platform, as images of many platforms do.
func index(single v1.Image, kind types.MediaType) (v1.ImageIndex, error) {
	file, err := single.ConfigFile()
	if err != nil {
		return nil, err
	}
	other := file.DeepCopy()
	other.Architecture = "arm64"
	foreign, err := mutate.ConfigFile(single, other)
	if err != nil {
		return nil, err
	}
	platform := func(i v1.Image, arch string) mutate.IndexAddendum {
		return mutate.IndexAddendum{Add: i, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}}
	}
	return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, kind), platform(foreign, "arm64"), platform(single, "amd64")), nil
}
