package imagestore

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/image"
	"github.com/containers/image/v5/manifest"
	"github.com/containers/image/v5/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxLayers = 1024
	// maxManifest bounds a manifest or an index, in bytes: maxLayers with 1 KiB of annotations each.
	maxManifest = 1 << 20
	// maxValues bounds how many JSON values it has, some 30 for each of maxLayers: whatever they are, to decode
	// them takes 14 MiB at most.
	maxValues = 32 << 10
)

// read fills in m from the manifest.
func (m *remote) read(ctx context.Context, r *registries, sys *types.SystemContext) error {
	var want digest.Digest
	if d, ok := m.name.ref.(reference.Digested); ok {
		want = d.Digest()
	}
	blob, kind, err := m.manifest(ctx, nil, want)
	if err != nil {
		return err
	}
	if m.digest, err = manifest.Digest(blob); err != nil {
		return m.unreadable(kind, err)
	}
	unparsed := image.UnparsedInstance(m.src, nil)
	if manifest.MIMETypeIsMultiImage(kind) {
		list, err := manifest.ListFromBlob(blob, kind)
		if err != nil {
			return m.unreadable(kind, err)
		}
		instance, err := list.ChooseInstance(sys)
		if err != nil {
			return fmt.Errorf("%s: %w: %w", m.name, err, errdefs.ErrNotFound)
		}
		unparsed = image.UnparsedInstance(m.src, &instance)
		if blob, kind, err = m.manifest(ctx, &instance, instance); err != nil {
			return err
		}
	}
	if err := r.allow(ctx, m, unparsed); err != nil {
		return err
	}
	return m.parse(blob, kind)
}

// manifest fetches what m's name refers to, or an instance of that, and returns it with its media type, as far as
// it has the digest that is wanted, if any. It is for the source and not for an UnparsedImage, which would decode
// it before it is bounded; a policy that reads it, too, has the same: from the source, or by the same digest.
func (m *remote) manifest(ctx context.Context, instance *digest.Digest, want digest.Digest) (blob []byte, kind string, err error) {
	blob, kind, err = m.src.GetManifest(ctx, instance)
	if err != nil {
		return nil, "", m.failed(ctx, err)
	}
	if len(blob) > maxManifest || values(blob) > maxValues {
		return nil, "", fmt.Errorf("manifest of %s has more than %d bytes or %d values; push the image again with fewer layers and annotations: %w", m.name, maxManifest, maxValues, errdefs.ErrInvalidArgument)
	}
	if want != "" {
		if same, err := manifest.MatchesDigest(blob, want); err != nil || !same {
			return nil, "", fmt.Errorf("manifest of %s arrived damaged: its digest is not %s; pull again, or have the registry checked: %w", m.name, want, errdefs.ErrDataLoss)
		}
	}
	return blob, mediaType(blob, kind), nil
}

// unreadable says that a manifest is not of its type. How it is not is what some host has answered.
func (m *remote) unreadable(kind string, err error) error {
	m.log(err)
	return fmt.Errorf("manifest of %s is no %s; push the image again with a current tool, or have the registry checked; the daemon's log says more: %w", m.name, kind, errdefs.ErrInvalidArgument)
}

// values counts the values of a JSON document, without decoding it. Empty lists and objects count twice.
func values(doc []byte) int {
	n, text := 1, false
	for i := 0; i < len(doc); i++ {
		switch c := doc[i]; {
		case c == '"':
			text = !text
		case text && c == '\\':
			i++
		case !text && (c == ',' || c == '[' || c == '{'):
			n++
		}
	}
	return n
}

func mediaType(blob []byte, kind string) string {
	if manifest.NormalizedMIMEType(kind) != kind || kind == "" {
		kind = manifest.GuessMIMEType(blob)
	}
	return manifest.NormalizedMIMEType(kind)
}

// configTypes are what a container image's configuration may call itself.
var configTypes = map[string]bool{
	ocispec.MediaTypeImageConfig:            true,
	manifest.DockerV2Schema2ConfigMediaType: true,
	"application/octet-stream":              true, // by old Docker
}

// parse reads the manifest of one instance and refuses what is not a container image.
func (m *remote) parse(blob []byte, kind string) error {
	if kind != ocispec.MediaTypeImageManifest && kind != manifest.DockerV2Schema2MediaType {
		return fmt.Errorf("%s has a manifest of type %s, which is too old or unknown; push it again with a current tool: %w", m.name, kind, errdefs.ErrNotImplemented)
	}
	parsed, err := manifest.FromBlob(blob, kind)
	if err != nil {
		return m.unreadable(kind, err)
	}
	config := parsed.ConfigInfo()
	if !configTypes[config.MediaType] {
		return fmt.Errorf("%s is no container image but an artifact (%.100s): %w", m.name, config.MediaType, errdefs.ErrInvalidArgument)
	}
	if err := config.Digest.Validate(); err != nil {
		return fmt.Errorf("manifest of %s: configuration: %w: %w", m.name, err, errdefs.ErrInvalidArgument)
	}
	m.config, m.size = config.Digest, config.Size
	left := int64(maxBytes)
	for _, l := range parsed.LayerInfos() {
		switch {
		case strings.HasSuffix(l.MediaType, "+encrypted"):
			return fmt.Errorf("layer %.100s of %s is encrypted: %w", l.Digest, m.name, errdefs.ErrNotImplemented)
		case !strings.Contains(l.MediaType, ".tar"):
			return fmt.Errorf("layer %.100s of %s is no archive but %.100s: %w", l.Digest, m.name, l.MediaType, errdefs.ErrInvalidArgument)
		case l.Digest.Validate() != nil || l.Size < 0:
			return fmt.Errorf("manifest of %s: layer %.100q of size %d: %w", m.name, l.Digest, l.Size, errdefs.ErrInvalidArgument)
		}
		m.layers = append(m.layers, layer{l.Digest, l.Size})
		if left -= l.Size; left < 0 {
			return fmt.Errorf("layers of %s have more than %d bytes together; keep data in a volume: %w", m.name, int64(maxBytes), errdefs.ErrResourceExhausted)
		}
	}
	if len(m.layers) > maxLayers {
		return fmt.Errorf("%s has %d layers, at most %d are possible: %w", m.name, len(m.layers), maxLayers, errdefs.ErrInvalidArgument)
	}
	return nil
}
