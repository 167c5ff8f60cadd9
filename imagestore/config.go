package imagestore

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxConfig bounds an image's configuration, in bytes: those with long histories and large labels have some
	// 100 KiB.
	maxConfig = 1 << 20
	// maxUsed bounds what of it is kept in memory for each image, in bytes: as much as Linux takes for one argument.
	maxUsed = 128 << 10
	// maxUser bounds the name of an image's user, in bytes: it is in every listing.
	maxUser = 256
)

// config is what is used of an image's configuration. Of the rest (history, labels) a few bytes can take hundreds
// when they are decoded.
type config struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Config       struct {
		User, WorkingDir, StopSignal string
		Env, Entrypoint, Cmd         []string
		Volumes                      map[string]struct{}
	} `json:"config"`
	RootFS struct {
		DiffIDs []digest.Digest `json:"diff_ids"`
	} `json:"rootfs"`
}

// parseConfig decodes a configuration. One of which more than maxUsed would be kept is ErrInvalidArgument.
func parseConfig(raw []byte) (*config, error) {
	c := &config{}
	if err := json.Unmarshal(raw, c); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	used := c.Config
	size := len(used.User) + len(used.WorkingDir) + len(used.StopSignal)
	for _, list := range [][]string{used.Env, used.Entrypoint, used.Cmd} {
		for _, s := range list {
			size += len(s) + 16 // a string's own two words
		}
	}
	for path := range used.Volumes {
		size += len(path) + 48 // its share of a map
	}
	if size > maxUsed {
		return nil, fmt.Errorf("environment, command and volumes take %d bytes, at most %d are possible; keep what is long in a file of the image: %w", size, maxUsed, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

// process is what of the configuration a container is started with.
func (c *config) process() ocispec.ImageConfig {
	used := c.Config
	return ocispec.ImageConfig{User: used.User, WorkingDir: used.WorkingDir, StopSignal: used.StopSignal,
		Env: used.Env, Entrypoint: used.Entrypoint, Cmd: used.Cmd, Volumes: used.Volumes}
}

// readConfig fetches the image's configuration.
func (m *remote) readConfig(ctx context.Context) ([]byte, *config, error) {
	if m.size > maxConfig {
		return nil, nil, fmt.Errorf("configuration of %s has %d bytes, at most %d are possible; build the image with less in its labels and history: %w", m.name, m.size, maxConfig, errdefs.ErrInvalidArgument)
	}
	stream, err := m.blob(ctx, layer{m.config, m.size})
	if err != nil {
		return nil, nil, err
	}
	defer stream.Close()
	raw, err := io.ReadAll(io.LimitReader(stream, maxConfig+1))
	if err != nil {
		return nil, nil, m.failed(ctx, err)
	}
	c, err := openConfig(m.name, m.config, raw)
	if err != nil {
		return nil, nil, err
	}
	return raw, c, m.fits(c)
}

// openConfig checks and decodes the configuration of what is called n.
func openConfig(n name, id digest.Digest, raw []byte) (*config, error) {
	if id.Algorithm().FromBytes(raw) != id {
		return nil, fmt.Errorf("configuration of %s arrived damaged: its digest is not %s; pull again, or have the registry checked: %w", n, id, errdefs.ErrDataLoss)
	}
	c, err := parseConfig(raw)
	if err != nil {
		return nil, fmt.Errorf("configuration of %s: %w", n, err)
	}
	if length := len(c.Config.User); length > maxUser {
		return nil, fmt.Errorf("configuration of %s: the user's name has %d bytes, at most %d are possible; build the image with a shorter one: %w", n, length, maxUser, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

// fits checks that the configuration is for this machine and agrees with the manifest.
func (m *remote) fits(c *config) error {
	arch := c.Architecture
	if c.OS != "" && c.OS != "linux" || arch != "" && arch != runtime.GOARCH && (arch != "386" || runtime.GOARCH != "amd64") {
		return fmt.Errorf("%s is for %.100s/%.100s, this machine is linux/%s: %w", m.name, c.OS, arch, runtime.GOARCH, errdefs.ErrNotFound)
	}
	if len(c.RootFS.DiffIDs) != len(m.layers) {
		return fmt.Errorf("%s has %d layers, but its configuration names %d: %w", m.name, len(m.layers), len(c.RootFS.DiffIDs), errdefs.ErrInvalidArgument)
	}
	for _, d := range c.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return fmt.Errorf("configuration of %s: layer %.100q: %w: %w", m.name, d, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
