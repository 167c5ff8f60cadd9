package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// How long an answer of readiness holds, and how long a look at a disk may take: one that does not
// answer is itself the finding.
const (
	readyFor  = 3 * time.Second
	readyLook = 5 * time.Second
)

// freeMin is how much of the root's file system must be free for pods to start, in bytes.
const freeMin = 16 << 20

// Needs are what no pod can run without.
type Needs struct {
	// Root is the folder of all that pods leave on the node.
	Root string
	// Programs are named by paths, or by names to be looked up on the PATH, files and devices by paths.
	Programs, Files, Devices []Need
}

// Need is one of them, and Mend what to do where it is missing.
type Need struct{ Name, Mend string }

// Ready returns a check of the needs, for Options.Runtime. It can be called often: answers are kept for
// some seconds, and callers never wait for a disk that hangs.
func Ready(n Needs) func(context.Context) error {
	r := &readiness{look: n.look}
	return r.check
}

func (n Needs) look() error {
	var found []string
	for _, p := range n.Programs {
		if _, err := exec.LookPath(p.Name); err != nil {
			found = append(found, fmt.Sprintf("%v: %s", err, p.Mend))
		}
	}
	for _, f := range n.Files {
		if err := unix.Access(f.Name, unix.R_OK); err != nil {
			found = append(found, fmt.Sprintf("%s: %v: %s", f.Name, err, f.Mend))
		}
	}
	for _, d := range n.Devices {
		f, err := os.OpenFile(d.Name, os.O_RDWR, 0)
		if err != nil {
			found = append(found, fmt.Sprintf("%v: %s", err, d.Mend))
			continue
		}
		f.Close()
	}
	if err := n.lookRoot(); err != nil {
		found = append(found, err.Error())
	}
	if len(found) == 0 {
		return nil
	}
	return errors.New(strings.Join(found, "; "))
}

func (n Needs) lookRoot() error {
	if err := unix.Access(n.Root, unix.W_OK|unix.X_OK); err != nil { // also of a file system that became read-only
		return fmt.Errorf("%s can't be written: %w: mend or remount its disk", n.Root, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(n.Root, &fs); err != nil {
		return fmt.Errorf("%s: %w", n.Root, err)
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < freeMin {
		return fmt.Errorf("the disk of %s has %d KiB free, a pod's start takes some MiB: remove images or other files from it", filepath.Clean(n.Root), free>>10)
	}
	if fs.Files > 0 && fs.Ffree == 0 {
		return fmt.Errorf("the disk of %s has no inodes free: remove files from it", filepath.Clean(n.Root))
	}
	return nil
}

// readiness keeps the answer of a look, and has one at a time.
type readiness struct {
	look func() error

	mu      sync.Mutex
	err     error
	at      time.Time     // of the answer; zero before the first
	looking chan struct{} // closed when the look under way has ended; nil without one
}

func (r *readiness) check(ctx context.Context) error {
	looking, err := r.latest()
	if looking == nil {
		return err
	}
	limit := time.NewTimer(readyLook)
	defer limit.Stop()
	select {
	case <-looking:
		_, err = r.latest()
		return err
	case <-limit.C:
		return fmt.Errorf("the disk of the runtime's files has not answered for %v: look after it (dmesg), or restart the node", readyLook)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// latest returns an answer that holds, or what to wait for.
func (r *readiness) latest() (<-chan struct{}, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.at.IsZero() && time.Since(r.at) < readyFor {
		return nil, r.err
	}
	if r.looking == nil {
		r.looking = make(chan struct{})
		go r.lookNow()
	}
	return r.looking, nil
}

func (r *readiness) lookNow() {
	err := r.look()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err, r.at = err, time.Now()
	close(r.looking)
	r.looking = nil
}
