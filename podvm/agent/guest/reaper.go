package guest

import (
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// exit is how a process ended.
type exit struct{ status unix.WaitStatus }

// code is the exit code as shells have it: 128 and the signal's number for one that was killed.
func (e exit) code() int32 {
	if e.status.Signaled() {
		return 128 + int32(e.status.Signal())
	}
	return int32(e.status.ExitStatus())
}

// reaper waits for all children of this process, also for those that it only inherits, which are
// the containers.
type reaper struct {
	mu      sync.Mutex
	waiters map[int]chan exit
	// starts counts starts that are under way. While there are any, exits that nobody waits for are
	// kept in orphans: a process may end before its starter knows its pid.
	starts  int
	orphans map[int]exit
}

func newReaper() (*reaper, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become the reaper of containers: %w", err)
	}
	r := &reaper{waiters: make(map[int]chan exit), orphans: make(map[int]exit)}
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	go func() {
		for range children {
			r.reap()
		}
	}()
	return r, nil
}

// reap collects all children that have ended.
func (r *reaper) reap() {
	for r.reapOne() {
	}
}

// reapOne waits and delivers under the lock, so that kill never meets the pid of a later process.
func (r *reaper) reapOne() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	var status unix.WaitStatus
	pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
	if err != nil || pid <= 0 {
		return err == unix.EINTR
	}
	if w, ok := r.waiters[pid]; ok {
		delete(r.waiters, pid)
		w <- exit{status}
	} else if r.starts > 0 {
		r.orphans[pid] = exit{status}
	}
	return true
}

// kill sends a signal to a claimed process. One that has ended is no error.
func (r *reaper) kill(pid int, claimed <-chan exit, sig unix.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w, ok := r.waiters[pid]; !ok || (<-chan exit)(w) != claimed {
		return nil
	}
	return unix.Kill(pid, sig)
}

// begin keeps exits until end, so that those of processes started in between can be claimed.
func (r *reaper) begin() (end func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.starts++
	return sync.OnceFunc(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.starts--; r.starts == 0 {
			clear(r.orphans)
		}
	})
}

// claim returns a channel on which the exit of a process comes. The process was started after a
// begin whose end is still to come.
func (r *reaper) claim(pid int) <-chan exit {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := make(chan exit, 1)
	if e, ok := r.orphans[pid]; ok {
		delete(r.orphans, pid)
		w <- e
		return w
	}
	r.waiters[pid] = w
	return w
}

// start runs a program. files are its descriptors from 0 on; nil ones are /dev/null.
func (r *reaper) start(argv []string, env []string, files []*os.File, sys *syscall.SysProcAttr) (pid int, ended <-chan exit, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, nil, err
	}
	defer null.Close()
	fds := make([]uintptr, len(files))
	for i, f := range files {
		if f == nil {
			f = null
		}
		if fds[i], err = descriptor(f); err != nil {
			return 0, nil, err
		}
	}
	defer r.begin()()
	pid, err = syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{Env: env, Files: fds, Sys: sys})
	if err != nil {
		return 0, nil, fmt.Errorf("run %s: %w", argv[0], err)
	}
	return pid, r.claim(pid), nil
}

// descriptor is f.Fd() without its side effect of making the file blocking.
func descriptor(f *os.File) (fd uintptr, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = raw.Control(func(n uintptr) { fd = n })
	return fd, err
}
