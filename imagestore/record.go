package imagestore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/atomicfile"
)

const recordVersion = 1

// record is what <hex>.json holds. It does not change: a changed image gets a new one.
type record struct {
	Version int
	ID      digest.Digest
	// Tags with the time at which each became this image's: of two images that claim one after a
	// crash, the later has it.
	Tags    map[string]time.Time
	Digests []string
	// Length of the EROFS file in bytes. A file of another length is damaged.
	Length int64
	// Config is the image's configuration as its digest was made of it. It is in the file only.
	Config []byte
	Pulled time.Time

	process ocispec.ImageConfig // of the configuration, kept
}

// maxDigests of an image are kept, the newest: a registry can have it under another one at each pull.
const maxDigests = 64

func newest(digests []string) []string { return digests[max(0, len(digests)-maxDigests):] }

func (s *Store) imagePath(id digest.Digest) string {
	return filepath.Join(s.o.Root, id.Encoded()+".erofs")
}

func (s *Store) recordPath(id digest.Digest) string {
	return filepath.Join(s.o.Root, id.Encoded()+".json")
}

// writeRecord writes a record. One without a configuration has that of the file it takes the place of.
func (s *Store) writeRecord(r *record) error {
	whole := *r
	if whole.Config == nil {
		old, err := s.readRecord(s.recordPath(r.ID))
		if err != nil {
			return fmt.Errorf("record of image %s: %w", r.ID, err)
		}
		whole.Config = old.Config
	}
	data, err := json.MarshalIndent(whole, "", "\t")
	if err != nil {
		return fmt.Errorf("record of image %s: %w", r.ID, err)
	}
	return atomicfile.Write(s.recordPath(r.ID), data, 0o600)
}

// load reads all records. What a crash left half-done goes; a record that can't be understood
// stays, with its file, but is not part of the store.
func (s *Store) load() error {
	entries, err := os.ReadDir(s.o.Root)
	if err != nil {
		return fmt.Errorf("open image store: %w", err)
	}
	recorded := map[string]bool{}
	for _, e := range entries {
		if hex, ok := strings.CutSuffix(e.Name(), ".json"); ok && !strings.HasPrefix(hex, ".") {
			recorded[hex] = true
			s.loadRecord(e.Name())
		}
	}
	for _, e := range entries {
		hex, image := strings.CutSuffix(e.Name(), ".erofs")
		unfinished := strings.HasPrefix(e.Name(), ".") && strings.Contains(e.Name(), ".json.")
		if image && !recorded[hex] || unfinished {
			slog.Info("remove unfinished image", "file", e.Name())
			if err := os.Remove(filepath.Join(s.o.Root, e.Name())); err != nil {
				return fmt.Errorf("open image store: %w", err)
			}
		}
	}
	return nil
}

func (s *Store) loadRecord(name string) {
	r, err := s.readRecord(filepath.Join(s.o.Root, name))
	if err != nil {
		slog.Warn("image record is left aside; remove it and its .erofs file if it stays", "file", name, "err", err)
		return
	}
	if err := s.checkFile(r); err != nil {
		slog.Warn("image is damaged and removed; it will be pulled again", "image", r.ID, "err", err)
		if err := s.deleteFiles(r.ID); err != nil {
			slog.Error("remove damaged image", "image", r.ID, "err", err)
		}
		return
	}
	r.Config = nil
	s.images[r.ID] = r
}

func (s *Store) readRecord(path string) (*record, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &record{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, err
	}
	switch {
	case r.Version != recordVersion:
		return nil, fmt.Errorf("version %d is not known here", r.Version)
	case r.ID.Validate() != nil || r.ID.Encoded()+".json" != filepath.Base(path):
		return nil, fmt.Errorf("is about image %.100q", r.ID)
	case r.ID.Algorithm().FromBytes(r.Config) != r.ID:
		return nil, errors.New("configuration does not match its digest")
	}
	if r.Tags == nil {
		r.Tags = map[string]time.Time{}
	}
	r.Digests = newest(r.Digests)
	c, err := parseConfig(r.Config)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	r.process = c.process()
	return r, nil
}

// checkFile checks that an image's file is there as a whole.
func (s *Store) checkFile(r *record) error {
	info, err := os.Stat(s.imagePath(r.ID))
	if err != nil {
		return err
	}
	if info.Size() != r.Length {
		return fmt.Errorf("file has %d bytes, not %d", info.Size(), r.Length)
	}
	return nil
}

// deleteFiles takes an image off the disk: first the record, so that a crash leaves no image
// without its file.
func (s *Store) deleteFiles(id digest.Digest) error {
	for _, path := range []string{s.recordPath(id), s.imagePath(id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := atomicfile.SyncDir(s.o.Root); err != nil {
			return err
		}
	}
	return nil
}

// image makes what the store hands out of a record.
func (s *Store) image(r *record) (Image, error) {
	i := Image{ID: r.ID.String(), Digests: slices.Clone(r.Digests), Pulled: r.Pulled}
	i.Config.Config = r.process
	for tag := range r.Tags {
		i.Tags = append(i.Tags, tag)
	}
	slices.Sort(i.Tags)
	slices.Sort(i.Digests)
	for _, name := range append(append([]string{i.ID}, i.Tags...), i.Digests...) {
		i.Pinned = i.Pinned || s.pinned[name]
	}
	var st unix.Stat_t
	if err := unix.Stat(s.imagePath(r.ID), &st); err != nil {
		return Image{}, fmt.Errorf("file of image %s: %w", r.ID, err)
	}
	i.Size = st.Blocks * 512
	return i, nil
}
