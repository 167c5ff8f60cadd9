package imagestore

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/atomicfile"
)

const logEvery = 10 * time.Second

// flight is a pull under way, with all who wait for it.
type flight struct {
	cancel  context.CancelCauseFunc
	waiting int // guarded by Store.mu
	done    chan struct{}
	image   Image // these two are set before done is closed
	err     error
}

// Pull brings an image into the store, or only its names if its content is there already. Calls for
// the same name with the same credentials share one pull; it ends when the last of them gives up.
//
// Its errors: ErrNotFound, ErrInvalidArgument (the name, or what the registry has under it),
// ErrUnauthenticated, ErrPermissionDenied (the registry, registries.conf, or with ErrRejected the
// policy), ErrUnavailable (also when nothing arrives for PullProgressTimeout), ErrDataLoss (what
// arrived is not what its digest says), ErrResourceExhausted (a full disk; an image beyond all
// bounds), ErrNotImplemented (schema 1, encrypted layers).
func (s *Store) Pull(ctx context.Context, ref string, auth *Auth) (Image, error) {
	n, err := s.registries.resolve(ref)
	if err != nil {
		return Image{}, err
	}
	key := flightKey(n, auth)
	s.mu.Lock()
	f := s.flights[key]
	if f == nil {
		f = s.startLocked(ctx, key, n, auth)
	}
	f.waiting++
	s.mu.Unlock()
	select {
	case <-f.done:
		return f.image, f.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	if f.waiting--; f.waiting == 0 {
		f.cancel(fmt.Errorf("pull of %s was given up: %w", n, context.Cause(ctx)))
		if s.flights[key] == f {
			delete(s.flights, key)
		}
	}
	s.mu.Unlock()
	return Image{}, fmt.Errorf("pull %s: %w", n, context.Cause(ctx))
}

// flightKey is equal for pulls that may share their result.
func flightKey(n name, auth *Auth) string {
	if auth == nil {
		auth = &Auth{}
	}
	return fmt.Sprintf("%s %x", n, sha256.Sum256(fmt.Appendf(nil, "%q", *auth)))
}

// startLocked starts a pull. s.mu is held.
func (s *Store) startLocked(ctx context.Context, key string, n name, auth *Auth) *flight {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	f := &flight{cancel: cancel, done: make(chan struct{})}
	s.flights[key] = f
	s.pulls.Go(func() {
		f.image, f.err = s.pull(ctx, cancel, n, auth)
		s.mu.Lock()
		if s.flights[key] == f {
			delete(s.flights, key)
		}
		s.mu.Unlock()
		cancel(nil)
		close(f.done)
	})
	return f
}

// pull runs one pull and tells how it went.
func (s *Store) pull(ctx context.Context, cancel context.CancelCauseFunc, n name, auth *Auth) (Image, error) {
	start := time.Now()
	result := PullResult{Ref: n.String()}
	slog.Info("pull image", "image", n.String())
	i, err := s.fetch(ctx, &patience{s.o.PullProgressTimeout, cancel}, n, auth, &result)
	if err != nil {
		err = fmt.Errorf("pull %s: %w", n, err)
	}
	result.Err, result.Took = err, time.Since(start)
	if s.o.Pulled != nil {
		s.o.Pulled(result)
	}
	if err == nil {
		slog.Info("image pulled", "image", n.String(), "id", i.ID, "cached", result.Cached,
			"downloaded", result.Downloaded, "unpacked", result.Unpacked, "size", i.Size, "ms", result.Took.Milliseconds())
	}
	return i, err
}

func (s *Store) fetch(ctx context.Context, p *patience, n name, auth *Auth, result *PullResult) (Image, error) {
	timer := p.watch()
	defer timer.Stop()
	m, err := s.registries.open(ctx, n, auth)
	if err != nil {
		return Image{}, err
	}
	defer m.close()
	timer.Stop() // what comes now waits for this machine, or for another pull with its own timer
	release, err := s.claim(ctx, m.config)
	if err != nil {
		return Image{}, err
	}
	defer release()
	if i, ok, err := s.attach(m); ok || err != nil {
		result.Cached = true
		return i, err
	}
	timer.Reset(p.limit)
	raw, config, err := m.readConfig(ctx)
	timer.Stop()
	if err != nil {
		return Image{}, err
	}
	b := &build{store: s, remote: m, diffIDs: config.RootFS.DiffIDs}
	length, err := b.run(ctx, p)
	result.Downloaded, result.Unpacked = b.downloaded.Load(), b.unpacked.Load()
	if err != nil {
		return Image{}, err
	}
	return s.commit(m, raw, config, length)
}

// claim makes the caller the only one who builds the image until it calls release.
func (s *Store) claim(ctx context.Context, id digest.Digest) (release func(), err error) {
	for {
		s.mu.Lock()
		other := s.building[id]
		if other == nil {
			mine := make(chan struct{})
			s.building[id] = mine
			s.mu.Unlock()
			return func() {
				s.mu.Lock()
				delete(s.building, id)
				s.mu.Unlock()
				close(mine)
			}, nil
		}
		s.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// attach gives an image that is in the store the names it was found by now.
func (s *Store) attach(m *remote) (Image, bool, error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	s.mu.Lock()
	r := s.images[m.config]
	s.mu.Unlock()
	if r == nil {
		return Image{}, false, nil
	}
	i, err := s.name(r, m)
	return i, true, err
}

// commit makes a file that build has put in its place an image.
func (s *Store) commit(m *remote, raw []byte, c *config, length int64) (Image, error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	r := &record{Version: recordVersion, ID: m.config, Length: length, Config: raw, Pulled: time.Now(), process: c.process()}
	i, err := s.name(r, m)
	if err != nil {
		return Image{}, errors.Join(s.explain(err, m, 0), s.deleteFiles(m.config))
	}
	return i, nil
}

// name writes the record with the names of m, which other images lose. s.changing is held.
func (s *Store) name(r *record, m *remote) (Image, error) {
	next := *r
	next.Tags, next.Digests = maps.Clone(r.Tags), slices.Clone(r.Digests)
	if next.Tags == nil {
		next.Tags = map[string]time.Time{}
	}
	tag, byDigest := m.name.tag(), m.name.withDigest(m.digest)
	changed := []*record{&next}
	if tag != "" {
		next.Tags[tag] = time.Now()
	}
	if !slices.Contains(next.Digests, byDigest) {
		next.Digests = newest(append(next.Digests, byDigest))
	}
	s.mu.Lock()
	if old := s.namedLocked(tag); old != nil && old.ID != r.ID {
		loser := *old
		loser.Tags = maps.Clone(old.Tags)
		delete(loser.Tags, tag)
		changed = append(changed, &loser)
	}
	s.mu.Unlock()
	for _, c := range changed {
		if err := s.writeRecord(c); err != nil {
			return Image{}, err
		}
	}
	s.mu.Lock()
	for _, c := range changed {
		c.Config = nil
		s.images[c.ID] = c
	}
	s.mu.Unlock()
	return s.image(&next)
}

// build makes the EROFS file of one image.
type build struct {
	store                *Store
	remote               *remote
	diffIDs              []digest.Digest
	downloaded, unpacked atomic.Int64
}

// run downloads the layers and merges them meanwhile. It returns the length of the image's file,
// which is complete, synced and in its place then.
func (b *build) run(ctx context.Context, p *patience) (int64, error) {
	if err := b.store.checkSpace(b.remote); err != nil {
		return 0, err
	}
	f, err := os.CreateTemp(b.store.staging, "image-*")
	if err != nil {
		return 0, b.store.explain(err, b.remote, 0)
	}
	defer f.Close()
	defer os.Remove(f.Name()) // once it is in its place, there is nothing of this name
	d, err := newDownload(b.remote, b.store.staging, p)
	if err != nil {
		return 0, b.store.explain(err, b.remote, 0)
	}
	defer d.close()
	stopLog := b.logProgress(d)
	length, err := b.merge(ctx, f, d)
	stopLog()
	b.downloaded.Store(d.done.Load())
	if err == nil {
		err = b.place(f)
	}
	if err != nil {
		return 0, b.store.explain(err, b.remote, b.unpacked.Load())
	}
	return length, nil
}

func (b *build) merge(ctx context.Context, f *os.File, d *download) (int64, error) {
	var length int64
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.run(ctx) })
	g.Go(func() error {
		var err error
		length, err = convert(ctx, f, b.remote.config, d.spools, b.diffIDs, &b.unpacked)
		return err
	})
	return length, g.Wait()
}

// place makes the file durable and gives it its name.
func (b *build) place(f *os.File) error {
	if err := f.Chmod(0o444); err != nil {
		return fmt.Errorf("finish image: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("finish image: %w", err)
	}
	if err := os.Rename(f.Name(), b.store.imagePath(b.remote.config)); err != nil {
		return fmt.Errorf("finish image: %w", err)
	}
	return atomicfile.SyncDir(b.store.o.Root)
}

// logProgress tells from time to time how far the pull is, until the returned function is called.
func (b *build) logProgress(d *download) (stop func()) {
	ticker := time.NewTicker(logEvery)
	quit := make(chan struct{})
	go func() {
		for {
			select {
			case <-quit:
				return
			case <-ticker.C:
				slog.Info("pulling image", "image", b.remote.name.String(), "downloaded", d.done.Load(), "of", b.remote.total(), "unpacked", b.unpacked.Load())
			}
		}
	}()
	return func() {
		ticker.Stop()
		close(quit)
	}
}

// total is the sum of the image's layers as they are downloaded, in bytes.
func (m *remote) total() int64 {
	var sum int64
	for _, l := range m.layers {
		sum += l.size
	}
	return sum
}

// checkSpace refuses an image whose layers alone don't fit on the disk.
func (s *Store) checkSpace(m *remote) error {
	if free, err := s.free(); err != nil || free >= m.total() {
		return err
	}
	return s.explain(unix.ENOSPC, m, 0)
}

func (s *Store) free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.o.Root, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", s.o.Root, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// explain turns a full disk into an error that says what was needed where. Others stay as they are.
func (s *Store) explain(err error, m *remote, unpacked int64) error {
	if !noSpace(err) {
		return err
	}
	free, freeErr := s.free()
	if freeErr != nil {
		return errors.Join(err, freeErr)
	}
	return fmt.Errorf("no space in %s: %d bytes of layers had to be staged and at least %d bytes unpacked, %d bytes are free now; remove images or enlarge the disk: %w: %w",
		s.o.Root, m.total(), unpacked, free, err, errdefs.ErrResourceExhausted)
}
