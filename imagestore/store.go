package imagestore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const defaultProgressTimeout = time.Minute

// Store holds the images of one root directory. It is safe for concurrent use.
type Store struct {
	o          Options
	staging    string
	lock       *os.File
	registries *registries
	pinned     map[string]bool
	pullMemory int64 // of the process of a pull, in bytes

	pulls sync.WaitGroup

	// changing serializes what changes the directory; readers never wait for it.
	changing sync.Mutex

	mu       sync.Mutex // guards what follows
	images   map[digest.Digest]*record
	flights  map[string]*flight
	building map[digest.Digest]chan struct{} // closed when the image was built, or not
}

// Open opens the store and removes what a crash has left behind. A root that another process has
// open is ErrFailedPrecondition.
func Open(o Options) (*Store, error) {
	bridgeLogs()
	if o.PullProgressTimeout == 0 {
		o.PullProgressTimeout = defaultProgressTimeout
	}
	s := &Store{o: o, staging: filepath.Join(o.Root, "staging"), pinned: map[string]bool{}, pullMemory: pullMemory,
		images: map[digest.Digest]*record{}, flights: map[string]*flight{}, building: map[digest.Digest]chan struct{}{}}
	if err := s.prepare(); err != nil {
		return nil, err
	}
	s.registries = newRegistries(o, s.staging)
	for _, ref := range o.Pinned {
		n, err := s.registries.resolve(ref)
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("pinned images: %w", err)
		}
		s.pinned[n.String()], s.pinned[ref] = true, true
	}
	if err := s.load(); err != nil {
		s.Close()
		return nil, err
	}
	s.settleTags()
	if _, err := os.Stat(systemPolicy); o.Policy == "" && errors.Is(err, fs.ErrNotExist) {
		slog.Info("no signature policy: images are accepted unsigned", "missing", systemPolicy)
	}
	return s, nil
}

// prepare makes the directories, takes the lock and empties the staging directory.
func (s *Store) prepare() error {
	if err := os.MkdirAll(s.o.Root, 0o700); err != nil {
		return fmt.Errorf("open image store: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(s.o.Root, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("open image store: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return fmt.Errorf("image store %s is in use by another process; stop it, or choose another root: %w", s.o.Root, errdefs.ErrFailedPrecondition)
	}
	s.lock = lock
	if err := empty(s.staging); err != nil {
		s.Close()
		return fmt.Errorf("open image store: %w", err)
	}
	return nil
}

// empty makes a directory that has nothing in it. One that is there is kept: on a full disk there may be no
// room for another.
func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return os.Mkdir(dir, 0o700)
	}
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

// Close ends the pulls under way and lets another process open the root. There must be no new calls
// meanwhile.
func (s *Store) Close() {
	s.mu.Lock()
	for _, f := range s.flights {
		f.cancel(fmt.Errorf("the image store is closed: %w", errdefs.ErrUnavailable))
	}
	s.mu.Unlock()
	s.pulls.Wait() // also for those that nobody waits for any more
	s.lock.Close() // a lock file: nothing to lose
}

// settleTags gives a tag that two records claim, after a crash between their writes, to the later.
func (s *Store) settleTags() {
	owner := map[string]*record{}
	for _, r := range s.images {
		for tag, since := range r.Tags {
			switch o := owner[tag]; {
			case o == nil:
				owner[tag] = r
			case o.Tags[tag].Before(since):
				delete(o.Tags, tag)
				owner[tag] = r
			default:
				delete(r.Tags, tag)
			}
		}
	}
}

// Image finds an image by its id, a unique prefix of that, a tag or a digest; short names as for
// Pull. ErrNotFound; a prefix of several ids is ErrInvalidArgument.
func (s *Store) Image(ref string) (Image, error) {
	r, err := s.find(ref)
	if err != nil {
		return Image{}, err
	}
	return s.image(r)
}

// Config returns the configuration of an image, found as by Image, as its registry has it: JSON by anybody.
func (s *Store) Config(ref string) ([]byte, error) {
	r, err := s.find(ref)
	if err != nil {
		return nil, err
	}
	whole, err := s.readRecord(s.recordPath(r.ID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("image %s: %w: %w", r.ID, err, errdefs.ErrNotFound) // removed meanwhile
	}
	if err != nil {
		return nil, fmt.Errorf("record of image %s: %w", r.ID, err)
	}
	return whole.Config, nil
}

func (s *Store) find(ref string) (*record, error) {
	n, err := s.registries.resolve(ref)
	if err != nil && !isID(ref) {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.images[digest.Digest(ref)]; r != nil {
		return r, nil
	}
	if err == nil {
		if r := s.namedLocked(n.String()); r != nil {
			return r, nil
		}
	}
	return s.prefixLocked(ref)
}

// isID tells whether ref looks like an id, or the beginning of one.
func isID(ref string) bool {
	hex := strings.TrimPrefix(ref, "sha256:")
	return hex != "" && strings.Trim(hex, "0123456789abcdef") == ""
}

// namedLocked finds an image by its full name. s.mu is held.
func (s *Store) namedLocked(full string) *record {
	for _, r := range s.images {
		if _, ok := r.Tags[full]; ok || slices.Contains(r.Digests, full) {
			return r
		}
	}
	return nil
}

// prefixLocked finds an image by the beginning of its id. s.mu is held.
func (s *Store) prefixLocked(ref string) (*record, error) {
	notFound := fmt.Errorf("image %.300q: %w", ref, errdefs.ErrNotFound)
	if !isID(ref) {
		return nil, notFound
	}
	var found *record
	for id, r := range s.images {
		if strings.HasPrefix(id.Encoded(), ref) || strings.HasPrefix(id.String(), ref) {
			if found != nil {
				return nil, fmt.Errorf("image id %q is ambiguous; give more of it: %w", ref, errdefs.ErrInvalidArgument)
			}
			found = r
		}
	}
	if found == nil {
		return nil, notFound
	}
	return found, nil
}

// Images lists all images, sorted by id.
func (s *Store) Images() []Image {
	s.mu.Lock()
	records := slices.Collect(maps.Values(s.images))
	s.mu.Unlock()
	slices.SortFunc(records, func(a, b *record) int { return strings.Compare(string(a.ID), string(b.ID)) })
	var all []Image
	for _, r := range records {
		i, err := s.image(r)
		if err != nil {
			slog.Debug("image vanished while it was listed", "image", r.ID, "err", err)
			continue
		}
		all = append(all, i)
	}
	return all
}

// Remove removes an image with all its names, by whichever of them it is called. An image that is
// not there is no error. Pods that have linked it keep it until they go.
func (s *Store) Remove(_ context.Context, ref string) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	r, err := s.find(ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.deleteFiles(r.ID); err != nil {
		return fmt.Errorf("remove image %s: %w", r.ID, err)
	}
	s.mu.Lock()
	delete(s.images, r.ID)
	s.mu.Unlock()
	slog.Info("image removed", "image", r.ID, "ref", ref)
	return nil
}

// Link makes path another name of an image's EROFS file: while it is there, so is the content. If
// path is already that, it succeeds; if it is something else, that is ErrAlreadyExists. A path on
// another file system is ErrFailedPrecondition.
func (s *Store) Link(id, path string) (Image, error) {
	r, err := s.find(id)
	if err != nil {
		return Image{}, err
	}
	i, err := s.image(r)
	if err != nil {
		return Image{}, fmt.Errorf("link image %s: %w: %w", r.ID, err, errdefs.ErrNotFound)
	}
	err = os.Link(s.imagePath(r.ID), path)
	switch {
	case err == nil || errors.Is(err, fs.ErrExist) && sameFile(s.imagePath(r.ID), path):
		return i, nil
	case errors.Is(err, fs.ErrExist):
		return Image{}, fmt.Errorf("link image %s: %w: %w", r.ID, err, errdefs.ErrAlreadyExists)
	case errors.Is(err, unix.EXDEV):
		return Image{}, fmt.Errorf("link image %s: images (%s) and pods must be on one file system: %w: %w", r.ID, s.o.Root, err, errdefs.ErrFailedPrecondition)
	}
	if _, gone := s.find(r.ID.String()); gone != nil {
		return Image{}, fmt.Errorf("link image: %w", gone) // removed meanwhile
	}
	return Image{}, fmt.Errorf("link image %s: %w", r.ID, err)
}

func sameFile(a, b string) bool {
	first, err := os.Stat(a)
	if err != nil {
		return false
	}
	second, err := os.Stat(b)
	return err == nil && os.SameFile(first, second)
}

// Usage adds up what the store takes of its disk, unfinished pulls included.
func (s *Store) Usage() (Usage, error) {
	u := Usage{Path: s.o.Root, Time: time.Now()}
	err := filepath.WalkDir(s.o.Root, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it went meanwhile
		}
		u.Bytes += uint64(st.Blocks) * 512
		u.Inodes++
		return err
	})
	if err != nil {
		return Usage{}, fmt.Errorf("usage of image store: %w", err)
	}
	return u, nil
}
