// Package template keeps the booted VM that pods are copy-on-write clones of: its memory in a file,
// its devices' state beside it. A template depends on the guest, the VMM, the CPU and the VM's
// shape; the key in its folder's name says which, and a template of another key is of no use.
package template

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/undo"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// Options say which templates a Store makes.
type Options struct {
	// Dir holds the templates, a folder each; it is made if needed.
	Dir string
	// Run holds the runtime folders of VMs that become templates: short, for unix sockets.
	Run string
	// Driver boots them. Where its VMs can't be snapshotted there are no templates.
	Driver vmm.Driver
	// Depends is all else that a template depends on: versions of VMM and guest, the host's kernel.
	Depends []string
	// Config is the VM: kernel, initramfs, command line, sizes. The rest is filled in.
	Config vmm.Config
	// Wants tells whether templates of a scope are used as things are configured; nil: all are. Others go.
	Wants func(scope string) bool
	// MakeDisk, where set, makes the file of Config.Disk.
	MakeDisk func(path string) error
	// OpenTap, where set, opens the tap of Config.Tap, which is needed only until the snapshot.
	OpenTap func() (*os.File, error)
	// Prepare, where set, is called with the booted VM before it is snapshotted: what it does there
	// no clone need do.
	Prepare func(context.Context, vmm.VM) error
	// Limit bounds the making of one; 0: 3 minutes.
	Limit time.Duration
}

// Store makes and finds templates. Its methods may be called concurrently.
type Store struct {
	options Options
	ctx     context.Context // that of the making of templates: ends with the store
	cancel  context.CancelCauseFunc
	making  sync.WaitGroup

	mu       sync.Mutex
	entries  map[string]*entry // by scope
	failures map[string]int    // by folder: clones that failed in a row
}

// entry is one template, or the attempt to have it.
type entry struct {
	dir   string        // also while it is made
	ready chan struct{} // closed when the rest is set
	err   error
	until time.Time // an error counts until then
}

// retry is how long a failed attempt is not repeated: pods start cold meanwhile.
const retry = time.Minute

// New makes a Store and removes half-made templates. Complete ones of other keys go too, and those of
// scopes that are not wanted or, but for the node's, were not used for a day (see also Sweep). Their clones, if
// any, run on, because they hold the memory file open.
func New(o Options) (*Store, error) {
	if o.Limit == 0 {
		o.Limit = 3 * time.Minute
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("templates: %w", err)
	}
	s := &Store{options: o, entries: map[string]*entry{}, failures: map[string]int{}}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s, s.sweep()
}

var errClosed = errors.New("the daemon ends")

// Close gives up templates that are being made and returns when nothing is left of them.
func (s *Store) Close() {
	s.cancel(errClosed)
	s.making.Wait()
}

// killLeft ends the VM of a template, also of one that a former daemon did not finish, and removes its
// runtime folder.
func (s *Store) killLeft(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	if err := process.KillIn(ctx, dir); err != nil {
		return fmt.Errorf("templates: %s: %w", dir, err)
	}
	return os.RemoveAll(dir)
}

// key names a template by all that it depends on.
func (s *Store) key(scope string) string {
	c := s.options.Config
	data, err := json.Marshal([]any{format, s.options.Driver.Name(), s.options.Depends, cpu(), c.Cmdline, c.Size, c.Max, scope})
	if err != nil {
		panic(err) // unreachable: strings and numbers
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

// Template returns the folder of the scope's template, which it makes, once, when there is none
// or when the one there is was damaged or of no use. Concurrent callers wait for the same one. An error is
// remembered for a minute; it is errdefs.ErrNotImplemented where the driver has no snapshots.
func (s *Store) Template(ctx context.Context, scope string) (string, error) {
	e := s.entry(scope)
	select {
	case <-e.ready:
	case <-ctx.Done():
		return "", fmt.Errorf("wait for the template: %w", ctx.Err())
	}
	if e.err != nil {
		return "", e.err
	}
	return e.dir, nil
}

func (s *Store) entry(scope string) *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[scope]; e != nil && e.usable() {
		if e.made() {
			touch(e.dir) // now, so that it does not go before the clone has opened its files
		}
		return e
	}
	e := &entry{ready: make(chan struct{}), dir: filepath.Join(s.options.Dir, s.key(scope))}
	s.entries[scope] = e
	s.making.Go(func() { s.fill(e, scope) })
	return e
}

// busy tells whether the entry is being made.
func (e *entry) busy() bool {
	select {
	case <-e.ready:
		return false
	default:
		return true
	}
}

// made tells whether the entry is a template.
func (e *entry) made() bool { return !e.busy() && e.err == nil }

// usable tells whether the entry is being made, or is intact, or has failed only just now.
func (e *entry) usable() bool {
	if e.busy() {
		return true
	}
	if e.err != nil {
		return time.Now().Before(e.until)
	}
	// A look at each file's size: a memory file cut short would kill the clones at some later time.
	return quickCheck(e.dir) == nil
}

func (s *Store) fill(e *entry, scope string) {
	defer close(e.ready)
	ctx, cancel := context.WithTimeout(s.ctx, s.options.Limit)
	defer cancel()
	dir, start := e.dir, time.Now()
	err := fullCheck(dir)
	if err == nil {
		err = s.useless(dir)
	}
	if err == nil {
		slog.Info("template found", "template", filepath.Base(dir), "ms", time.Since(start).Milliseconds())
		touch(dir)
		return
	}
	if !errors.Is(err, fs.ErrNotExist) {
		slog.Warn("template is made anew", "template", filepath.Base(dir), "err", err)
	}
	if err := s.make(ctx, dir, scope); err != nil {
		e.err, e.until = fmt.Errorf("make template: %w", err), time.Now().Add(retry)
		return
	}
	s.Worked(dir) // as far as is known
	slog.Info("template made", "template", filepath.Base(dir), "bytes", diskUsage(dir), "ms", time.Since(start).Milliseconds())
}

// Disk is the file that the disk of a clone of this template begins as a copy of.
func (s *Store) Disk(dir string) string { return filepath.Join(dir, "disk.img") }

const runPrefix = "template-"

// make boots a VM with its memory in a file and snapshots it.
func (s *Store) make(ctx context.Context, dir, scope string) error {
	err := os.RemoveAll(dir)
	if err != nil {
		return err
	}
	if err := room(filepath.Dir(dir), s.options.Config.Size.Memory); err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	u.Push("remove template", func(context.Context) error { return os.RemoveAll(dir) })
	run := filepath.Join(s.options.Run, runPrefix+filepath.Base(dir))
	if err := os.MkdirAll(run, 0o700); err != nil {
		return err
	}
	defer func() {
		if err := s.killLeft(run); err != nil {
			slog.Error("end the VM of a template: the next start of the daemon tries again", "err", err)
		}
	}()
	c := s.options.Config
	c.ID, c.Dir, c.MemoryFile = filepath.Base(run), run, filepath.Join(dir, "memory")
	if s.options.MakeDisk != nil {
		c.Disk = &vmm.Disk{Serial: c.Disk.Serial, Path: s.Disk(dir)}
		if err := s.options.MakeDisk(c.Disk.Path); err != nil {
			return err
		}
	}
	if s.options.OpenTap != nil {
		if c.Tap, err = s.options.OpenTap(); err != nil {
			return err
		}
		defer c.Tap.Close()
	}
	v, err := s.options.Driver.Launch(ctx, c)
	if err != nil {
		return explain(err, dir)
	}
	defer kill(v)
	if err := s.snapshot(ctx, v, dir); err != nil {
		return explain(err, dir)
	}
	if err := writeManifest(dir, scope); err != nil {
		return err
	}
	u.Release()
	return nil
}

// killLimit is how long a VMM may take to end.
const killLimit = time.Minute

func kill(v vmm.VM) {
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	if err := v.Kill(ctx); err != nil {
		slog.Error("end the VM of a template", "err", err)
	}
}

func (s *Store) snapshot(ctx context.Context, v vmm.VM, dir string) error {
	snapshotter, ok := v.(vmm.Snapshotter)
	if !ok {
		return fmt.Errorf("%s has no snapshots: %w", s.options.Driver.Name(), errdefs.ErrNotImplemented)
	}
	if s.options.Prepare != nil {
		if err := s.options.Prepare(ctx, v); err != nil {
			return err
		}
	}
	// The guest has handled what came before this connection when it closes this one.
	conn, err := v.Dial(ctx, vmm.AgentPort)
	if err != nil {
		return err
	}
	if err := hangUp(conn); err != nil {
		return err
	}
	return snapshotter.Snapshot(ctx, dir)
}

// room refuses to begin where a guest's memory may not fit. A guest that comes upon the end of the disk
// need not fail: KVM has its vCPU take the same page fault again and again.
func room(dir string, memory int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("room in %s: %w", dir, err)
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < memory {
		return fmt.Errorf("the disk of %s has %d MiB free, and the memory of a guest may take %d: free some: %w", dir, free>>20, memory>>20, errdefs.ErrResourceExhausted)
	}
	return nil
}

// explain adds that the disk is full, where it is: a VMM that can't write its guest's memory there is
// killed by the kernel, and can't say so.
func explain(err error, dir string) error {
	var fs unix.Statfs_t
	const little = 1 << 20
	if unix.Statfs(dir, &fs) != nil || fs.Bavail*uint64(fs.Bsize) > little {
		return err
	}
	return fmt.Errorf("the disk of %s is full: free some: %w: %w", filepath.Dir(dir), errdefs.ErrResourceExhausted, err)
}

// hangUpLimit is how long the agent may take to close a connection.
const hangUpLimit = 10 * time.Second

// hangUp closes a connection and waits until the guest has closed it too. A guest that is snapshotted
// before that has it for ever, and its clones take their own first connection for the old one.
func hangUp(conn net.Conn) error {
	defer conn.Close()
	half, ok := conn.(interface{ CloseWrite() error })
	if !ok {
		return nil
	}
	err := half.CloseWrite()
	if err == nil {
		err = conn.SetReadDeadline(time.Now().Add(hangUpLimit))
	}
	if err == nil {
		_, err = io.Copy(io.Discard, io.LimitReader(conn, 1<<20))
	}
	if err != nil {
		return fmt.Errorf("wait for the agent to hang up: %w", err)
	}
	return nil
}

// failuresMax is how many clones in a row may fail before a template that is whole is of no use all the
// same: it may have been made in a bad moment.
const failuresMax = 2

func (s *Store) useless(dir string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.failures[dir]; n >= failuresMax {
		return fmt.Errorf("%d clones in a row did not start", n)
	}
	return nil
}

// Worked tells the store that a clone of dir has answered.
func (s *Store) Worked(dir string) {
	touch(dir)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.failures, dir)
}

// Failed tells the store that a clone of dir did not start. The template is checked whole before it
// is used again, and made anew when that happens again and again.
func (s *Store) Failed(dir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures[dir]++
	for scope, e := range s.entries {
		if e.dir == dir && !e.busy() {
			delete(s.entries, scope)
		}
	}
}
