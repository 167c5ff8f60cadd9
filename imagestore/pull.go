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
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
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
// arrived is not what its digest says), ErrResourceExhausted (a full disk; an image, or what a registry
// says, beyond all bounds), ErrNotImplemented (schema 1, encrypted layers).
func (s *Store) Pull(ctx context.Context, ref string, auth *Auth) (Image, error) {
	s.registries.reload()
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

// fetch has a process of the pull's own read what the registry says, and takes what it has made into the store.
func (s *Store) fetch(ctx context.Context, p *patience, n name, auth *Auth, result *PullResult) (Image, error) {
	by, err := s.startPuller(n)
	if err != nil {
		return Image{}, s.explain(err, 0, 0)
	}
	defer by.close()
	stop := context.AfterFunc(ctx, by.cancel)
	defer stop()
	i, err := s.fetchBy(ctx, by, p, auth, result)
	result.Downloaded, result.Unpacked = by.downloaded.Load(), by.unpacked.Load()
	if err != nil && ctx.Err() != nil {
		return Image{}, context.Cause(ctx)
	}
	return i, err
}

func (s *Store) fetchBy(ctx context.Context, by *puller, p *patience, auth *Auth, result *PullResult) (Image, error) {
	timer := p.watch()
	defer timer.Stop()
	err := by.say(request{Name: by.name.String(), Auth: auth, Dir: by.dir, RegistriesConf: s.o.RegistriesConf, Policy: s.o.Policy,
		AuthFile: s.o.AuthFile, Limit: s.o.PullProgressTimeout, Memory: s.pullMemory})
	if err != nil {
		return Image{}, err
	}
	f, err := by.find()
	timer.Stop() // what comes now waits for this machine, or for another pull with its own timer
	if err != nil {
		return Image{}, err
	}
	release, err := s.claim(ctx, f.Config)
	if err != nil {
		return Image{}, err
	}
	defer release()
	if i, ok, err := s.attach(f); ok || err != nil {
		result.Cached = true
		return i, err
	}
	timer.Reset(p.limit)
	return s.build(by, f, timer)
}

// build takes an image that is not in the store from the process. timer runs, until layers come, for which the
// process has others.
func (s *Store) build(by *puller, f *found, timer *time.Timer) (Image, error) {
	if err := s.checkSpace(f); err != nil {
		return Image{}, err
	}
	if err := by.say(goOn{}); err != nil {
		return Image{}, err
	}
	raw, config, err := by.config(f)
	timer.Stop()
	if err != nil {
		return Image{}, err
	}
	stopLog := by.logProgress(f)
	err = by.wait()
	stopLog()
	var length int64
	if err == nil {
		length, err = s.place(by, f)
	}
	if err != nil {
		return Image{}, s.explain(err, f.Total, by.unpacked.Load())
	}
	return s.commit(f, raw, config, length)
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
func (s *Store) attach(f *found) (Image, bool, error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	s.mu.Lock()
	r := s.images[f.Config]
	s.mu.Unlock()
	if r == nil {
		return Image{}, false, nil
	}
	i, err := s.name(r, f)
	return i, true, err
}

// commit makes a file that is in its place an image.
func (s *Store) commit(f *found, raw []byte, c *config, length int64) (Image, error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	r := &record{Version: recordVersion, ID: f.Config, Length: length, Config: raw, Pulled: time.Now(), process: c.process()}
	i, err := s.name(r, f)
	if err != nil {
		return Image{}, errors.Join(s.explain(err, f.Total, 0), s.deleteFiles(f.Config))
	}
	return i, nil
}

// name writes the record with the names of f, which other images lose. s.changing is held.
func (s *Store) name(r *record, f *found) (Image, error) {
	next := *r
	next.Tags, next.Digests = maps.Clone(r.Tags), slices.Clone(r.Digests)
	if next.Tags == nil {
		next.Tags = map[string]time.Time{}
	}
	tag, byDigest := f.name.tag(), f.name.withDigest(f.Digest)
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

// place makes the file that the process has made durable, gives it its name and returns its length. Nobody writes
// to it any more.
func (s *Store) place(by *puller, f *found) (int64, error) {
	info, err := by.image.Stat()
	if err != nil {
		return 0, fmt.Errorf("finish image: %w", err)
	}
	if err := by.image.Chmod(0o444); err != nil {
		return 0, fmt.Errorf("finish image: %w", err)
	}
	if err := by.image.Sync(); err != nil {
		return 0, fmt.Errorf("finish image: %w", err)
	}
	if err := os.Rename(by.imagePath(), s.imagePath(f.Config)); err != nil {
		return 0, fmt.Errorf("finish image: %w", err)
	}
	return info.Size(), atomicfile.SyncDir(s.o.Root)
}

// logProgress tells from time to time how far the pull is, until the returned function is called.
func (p *puller) logProgress(f *found) (stop func()) {
	ticker := time.NewTicker(logEvery)
	quit := make(chan struct{})
	go func() {
		for {
			select {
			case <-quit:
				return
			case <-ticker.C:
				slog.Info("pulling image", "image", p.name.String(), "downloaded", p.downloaded.Load(), "of", f.Total, "unpacked", p.unpacked.Load())
			}
		}
	}()
	return func() {
		ticker.Stop()
		close(quit)
	}
}

// checkSpace refuses an image whose layers alone don't fit on the disk.
func (s *Store) checkSpace(f *found) error {
	if free, err := s.free(); err != nil || free >= f.Total {
		return err
	}
	return s.explain(unix.ENOSPC, f.Total, 0)
}

func (s *Store) free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.o.Root, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", s.o.Root, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// explain turns a full disk into an error that says what was needed where, as far as that is known. Others stay as
// they are.
func (s *Store) explain(err error, total, unpacked int64) error {
	if !noSpace(err) {
		return err
	}
	free, freeErr := s.free()
	if freeErr != nil {
		return errors.Join(err, freeErr)
	}
	return fmt.Errorf("no space in %s: %d bytes of layers had to be staged and at least %d bytes unpacked, %d bytes are free now; remove images or enlarge the disk: %w: %w",
		s.o.Root, total, unpacked, free, err, errdefs.ErrResourceExhausted)
}
