// Package share shows directories of the host to guests. A pod that has some gets a process (Serve) with
// nothing but these directories in its mount namespace, which speaks FUSE with the guest's kernel, by way
// of the agent, and outlives the daemon. What is read and written is the host's own file: nothing is copied.
package share

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

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
	// Follow shows what the host mounts below it from now on, and no longer what it unmounts. For that the
	// guest is made to forget, from time to time, what it has seen of other file systems below and has not
	// open: what a guest knows is busy for the host.
	Follow bool `json:",omitempty"`
	// Keep leaves a guest that follows its knowledge: it has mounts of its own below, which would go with it.
	Keep bool `json:",omitempty"`
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
// Release, without the daemon too. A directory that is being served already is no error. Should the process
// die, another one takes its place: what was open is lost to the guest then (ENOTCONN), and containers that
// start find the directory.
func (s *Server) Share(ctx context.Context, pod Pod, d Dir) error {
	p := s.of(pod)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.life, cancel)()
	if err := p.lock(ctx); err != nil {
		return err
	}
	defer p.unlock()
	if err := p.run(ctx); err != nil {
		return err
	}
	if err := p.serve(ctx, d); err != nil {
		return err
	}
	p.dirs[d.Tag] = d
	return nil
}

// Resume goes on serving what a former daemon has served, and does not wait for it: the process may run, and
// its guest may have to be joined to it again, where the daemon stood between the two.
func (s *Server) Resume(pod Pod, dirs []Dir) {
	p := s.of(pod)
	go func() {
		if p.lock(p.life) != nil {
			return
		}
		defer p.unlock()
		for _, d := range dirs {
			p.dirs[d.Tag] = d
		}
		p.look()
	}()
}

func (s *Server) of(pod Pod) *served {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pods[pod.Dir]
	if p == nil {
		p = newServed(pod, s.program)
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
		select {
		case p.turn <- struct{}{}: // whoever has it would start the process again
			defer p.unlock()
		case <-ctx.Done():
			return fmt.Errorf("wait for a host directory that is being served: %w", ctx.Err())
		}
	}
	if _, err := os.Lstat(folder(run)); errors.Is(err, fs.ErrNotExist) {
		return nil // as for most pods: there never was a process, and it need not be looked for
	}
	if err := process.KillIn(ctx, folder(run)); err != nil {
		return fmt.Errorf("end the process that serves host directories: %w", err)
	}
	return nil
}

// SetOOMScore is process.SetOOMScore for the process of the pod with this runtime folder, if there is one.
func (s *Server) SetOOMScore(run string, score int) error {
	return process.SetOOMScore(folder(run), score)
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
