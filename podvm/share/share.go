// Package share shows directories of the host to guests. A pod that has some gets a process (Serve) with
// nothing but these directories in its mount namespace, which speaks FUSE with the guest's kernel, by way
// of the agent, and outlives the daemon. What is read and written is the host's own file: nothing is copied.
package share

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// Dir is a directory of the host that a guest sees.
type Dir struct {
	// Tag names it in its pod: it is made of the rest, so that the same directory is served once.
	Tag string
	// Path is absolute and has no symbolic links in it.
	Path string
	// ReadOnly directories can't be written by the guest; other file systems, which are mounted below, can,
	// unless Recursive is set.
	ReadOnly  bool
	Recursive bool `json:",omitempty"`
	// Follow shows what the host mounts below it from now on, and no longer what it unmounts.
	Follow bool `json:",omitempty"`
}

// Pod is whom directories are served to.
type Pod struct {
	ID string
	// Dir is the pod's runtime folder, which exists.
	Dir string
	// Cgroup, where set, is the cgroup v2 directory of the pod's VM: the process runs in it.
	Cgroup string
	Guest  agent.Dialer
}

// Server has directories served to pods. Its methods may be called concurrently.
type Server struct {
	program []string

	mu   sync.Mutex
	pods map[string]*served // by runtime folder
}

// New returns a server whose processes are started with this command line: one that calls Serve.
func New(program ...string) *Server { return &Server{program: program, pods: map[string]*served{}} }

// folder is where the process of a pod works.
func folder(run string) string { return filepath.Join(run, "share") }

// Share begins to serve the directory, and returns when the guest has mounted it. Serving goes on until
// Release, without the daemon too. A directory that is being served already is no error; after a restart
// of the daemon Share finds the process, and joins its guest to it again where the daemon stood between
// the two. Should the process die, another one takes its place: what was open is lost to the guest then
// (ENOTCONN), and containers that start find the directory.
func (s *Server) Share(ctx context.Context, pod Pod, d Dir) error {
	return s.of(pod).share(ctx, d)
}

func (s *Server) of(pod Pod) *served {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pods[pod.Dir]
	if p == nil {
		p = &served{Pod: pod, program: s.program, turn: make(chan struct{}, 1), dirs: map[string]Dir{}, relays: map[string]bool{}}
		p.life, p.end = context.WithCancel(context.Background())
		s.pods[pod.Dir] = p
	}
	return p
}

// Release ends all that is served to the pod with this runtime folder, also by a process that a former
// daemon started, and returns when its process, and with it every mount, is gone. It is idempotent.
func (s *Server) Release(ctx context.Context, run string) error {
	s.mu.Lock()
	p := s.pods[run]
	delete(s.pods, run)
	s.mu.Unlock()
	if p != nil {
		p.end()
		p.turn <- struct{}{} // a Share that goes on would start it again
		defer func() { <-p.turn }()
	}
	if err := process.KillIn(ctx, folder(run)); err != nil {
		return fmt.Errorf("end the process that serves host directories: %w", err)
	}
	return nil
}

// Close ends the daemon's part: processes go on, and what the daemon relays waits for the next one.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.pods {
		p.end()
	}
	clear(s.pods)
}

// served is a pod that directories are served to.
type served struct {
	Pod
	program []string
	life    context.Context // until Release or Close
	end     context.CancelFunc
	turn    chan struct{} // held by whoever changes the rest
	process *process.Process
	dirs    map[string]Dir  // by tag
	relays  map[string]bool // tags whose streams this daemon relays
}

// share serves one directory more.
func (p *served) share(ctx context.Context, d Dir) error {
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for another directory: %w", ctx.Err())
	}
	defer func() { <-p.turn }()
	if err := p.life.Err(); err != nil {
		return fmt.Errorf("the pod is being stopped: %w", err)
	}
	if err := p.run(ctx); err != nil {
		return err
	}
	have, err := p.ask(ctx, request{Tag: d.Tag}, nil)
	if err != nil {
		return err
	}
	if !have.Known {
		if err := p.attach(d); err != nil {
			return err
		}
	}
	p.dirs[d.Tag] = d
	if have.Connected || p.relays[d.Tag] {
		return nil
	}
	return p.connect(ctx, d)
}

// Pauses before a process that died is replaced, or a stream that broke: a guest that can do that may not
// keep the node busy.
const pauseMin, pauseMax = 100 * time.Millisecond, time.Minute

// pause returns false where the pod is released meanwhile.
func (p *served) pause(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-p.life.Done():
		return false
	}
}

// watch replaces the process when it dies, until Release.
func (p *served) watch(proc *process.Process, pause time.Duration) {
	select {
	case <-proc.Done():
	case <-p.life.Done():
		return
	}
	slog.Error("the process that serves host directories has died: what its pod has open in them is lost", "pod", p.ID, "err", proc.Err(), "log", logPath(folder(p.Dir)))
	if !p.pause(pause) {
		return
	}
	if err := p.again(proc, pause); err != nil && p.life.Err() == nil {
		slog.Error("serve host directories again", "pod", p.ID, "err", err)
	}
}

// again serves all directories by a new process.
func (p *served) again(died *process.Process, pause time.Duration) error {
	p.turn <- struct{}{}
	if p.process != died {
		<-p.turn
		return nil
	}
	p.process = nil
	err := p.start(p.life, min(2*pause, pauseMax))
	dirs := slices.Collect(maps.Values(p.dirs))
	<-p.turn
	for _, d := range dirs {
		if err == nil {
			err = errors.Join(err, p.share(p.life, d))
		}
	}
	return err
}
