package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/caisson-vm/caisson/internal/undo"
	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// container is one container, from its creation until it is removed.
type container struct {
	a  *Agent
	id string
	// turn holds a token: who has it may create, start, update or remove.
	turn chan struct{}
	// undo takes back what Create did; it belongs to who has the turn.
	undo undo.Stack

	// These are set by Create and not changed afterwards.
	dir       string // of its bundle
	layer     string // of its writable layer
	project   uint32 // that counts the layer
	process   *specs.Process
	pidNS     *specs.LinuxNamespace
	writeback []string
	stdinOnce bool
	proc      spawned
	// failed is why there is no process: crun could not make it.
	failed *failure
	io     *stdio
	out    *output
	taps   taps
	// exited is closed when the process has ended and that was published.
	exited chan struct{}

	mu    sync.Mutex
	state *agent.ContainerState // replaced, never changed
}

// container returns a container that was created.
func (a *Agent) container(id string) (*container, error) {
	a.mu.Lock()
	c := a.containers[id]
	a.mu.Unlock()
	if c == nil || c.now() == nil {
		return nil, fmt.Errorf("no container %s in this pod: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// storage is where layers and volumes are, and what counts them.
func (a *Agent) storage() (string, *quotas) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.scratch, a.quotas
}

// lock takes the turn; the caller gives it back.
func (c *container) lock(ctx context.Context) error {
	select {
	case <-c.turn:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *container) unlock() { c.turn <- struct{}{} }

// now is the container's state; nil while it is being created.
func (c *container) now() *agent.ContainerState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// running returns the pid of a process that runs.
func (c *container) running() (int, bool) {
	return c.proc.pid, c.now().State == agent.State_STATE_RUNNING
}

// become replaces the state and tells the watchers. An exit is final.
func (c *container) become(change func(s *agent.ContainerState)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &agent.ContainerState{Id: c.id}
	if old := c.state; old != nil {
		if old.State == agent.State_STATE_EXITED {
			return
		}
		s.State, s.StartedNs = old.State, old.StartedNs
	}
	change(s)
	c.state = s
	c.a.watch.set(s)
}

func (c *container) start(ctx context.Context) (*agent.StartResponse, error) {
	if err := c.lock(ctx); err != nil {
		return nil, err
	}
	defer c.unlock()
	if s := c.now().State; s != agent.State_STATE_CREATED {
		return nil, fmt.Errorf("container %s was started already: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if c.failed != nil {
		c.failed.end()
		return nil, fmt.Errorf("start container %s: %w", c.id, c.failed.err)
	}
	// Before the fact, so that an exit, however soon, finds it running.
	started := time.Now().UnixNano()
	c.become(func(s *agent.ContainerState) { s.State, s.StartedNs = agent.State_STATE_RUNNING, started })
	if err := c.a.release(c.id); err != nil {
		c.become(func(s *agent.ContainerState) { s.State, s.StartedNs = agent.State_STATE_CREATED, 0 })
		return nil, fmt.Errorf("start container %s: %w", c.id, err)
	}
	return &agent.StartResponse{StartedNs: started, Pid: uint32(c.proc.pid)}, nil
}

// follow waits for the process to end, and publishes it.
func (c *container) follow() {
	e := <-c.proc.ended
	finished := time.Now().UnixNano()
	if c.pidNS == nil || c.pidNS.Path != "" {
		// The kernel has not ended the others, as it does with a PID namespace.
		if err := c.killAll(); err != nil {
			slog.Warn("end the rest of a container", "container", c.id, "err", err)
		}
	}
	oom := !c.a.o.NoCgroups && c.oomKills() > 0
	files := c.written()
	c.become(func(s *agent.ContainerState) {
		s.State, s.FinishedNs, s.ExitCode, s.OomKilled, s.Files = agent.State_STATE_EXITED, finished, e.code(), oom, files
	})
	c.io.ended()
	close(c.exited)
}

// written reads the files that go back to the host.
func (c *container) written() []*agent.WrittenFile {
	var files []*agent.WrittenFile
	room := agent.WrittenAll
	for _, name := range c.writeback {
		if len(files) == agent.WrittenFiles {
			slog.Warn("the container wrote more files than an end brings back", "container", c.id, "most", agent.WrittenFiles)
			break
		}
		file, err := c.a.files.written(name, room)
		if err != nil {
			slog.Warn("read a file that the container wrote", "container", c.id, "file", name, "err", err)
		}
		if file != nil {
			files, room = append(files, file), room-len(file.Content)
		}
	}
	return files
}

// signal sends a signal to the main process or to all.
func (c *container) signal(sig unix.Signal, all bool) error {
	if c.now().State == agent.State_STATE_EXITED {
		return nil
	}
	if sig <= 0 || sig > 64 {
		return fmt.Errorf("no signal %d: %w", sig, errdefs.ErrInvalidArgument)
	}
	if c.failed != nil {
		c.failed.end()
		return nil
	}
	if all {
		return c.signalAll(sig)
	}
	return c.a.reaper.kill(c.proc.pid, c.proc.ended, sig)
}

func (c *container) update(ctx context.Context, resources []byte) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	if c.now().State == agent.State_STATE_EXITED {
		return fmt.Errorf("container %s has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if c.failed != nil {
		return nil // there is nothing to limit, and its start will tell
	}
	file := filepath.Join(c.dir, "resources.json")
	if err := os.WriteFile(file, resources, 0o600); err != nil {
		return err
	}
	if err := c.a.crun(ctx, nil, "update", "--resources="+file, c.id); err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	return nil
}

// remove removes a container, if there is one; one that is being created is awaited.
func (a *Agent) remove(ctx context.Context, id string) error {
	a.mu.Lock()
	c := a.containers[id]
	a.mu.Unlock()
	if c == nil {
		return nil
	}
	return c.remove(ctx)
}

// remove kills what is left and takes back what create did.
func (c *container) remove(ctx context.Context) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	if !c.a.owns(c) {
		return nil // somebody else just removed it
	}
	if err := c.killAll(); err != nil {
		return fmt.Errorf("kill container %s: %w", c.id, err)
	}
	if c.failed != nil {
		c.failed.end()
	}
	select {
	case <-c.exited:
	case <-ctx.Done():
		return fmt.Errorf("await the end of container %s: %w", c.id, context.Cause(ctx))
	}
	c.undo.Run()
	c.a.forget(c)
	return nil
}

func (a *Agent) owns(c *container) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.containers[c.id] == c
}

func (a *Agent) forget(c *container) {
	a.mu.Lock()
	delete(a.containers, c.id)
	a.mu.Unlock()
	a.watch.forget(c.id)
}

// goneSuffix is added to the name of a directory that is being deleted.
const goneSuffix = ".gone"

// removeAll deletes a directory, out of sight at once and in the background, because a layer may
// hold very many files.
func removeAll(dir string) error {
	gone := dir + goneSuffix
	if err := os.Rename(dir, gone); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	go func() {
		if err := os.RemoveAll(gone); err != nil {
			slog.Warn("delete a writable layer", "err", err)
		}
	}()
	return nil
}
