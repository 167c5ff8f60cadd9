// Package process starts VMM processes that outlive the daemon, finds them again after it was
// restarted, and waits for their end without a thread or a timer per process.
package process

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/atomicfile"
)

// Spec says what to start.
type Spec struct {
	Path string
	Args []string // without the program's name
	Env  []string // beside PATH
	Dir  string
	// Log takes standard output and error; nil: /dev/null.
	Log *os.File
	// Files become descriptors 3, 4, ... No other descriptor is inherited.
	Files []*os.File
	// Cgroup, where set, is a cgroup v2 directory in which the process starts.
	Cgroup string
	// Namespaces are those that the process is to have of its own, CLONE_NEW*.
	Namespaces uintptr
}

// Identity names a process for as long as the machine runs, even when its number is used again.
type Identity struct {
	PID int
	// Start is its start time in clock ticks since boot (/proc/PID/stat, field 22).
	Start uint64
	// Boot is the boot_id of the machine.
	Boot string
}

// Process is a running process, or one that has ended.
type Process struct {
	identity Identity
	pidfd    *os.File
	cmd      *exec.Cmd // nil when it is not our child
	done     chan struct{}
	err      error // written before done is closed
}

// Start starts a process in a session of its own. It does not end with the daemon.
func Start(s Spec) (*Process, error) {
	if err := closeOnExec(); err != nil {
		return nil, err
	}
	cmd := exec.Command(s.Path, s.Args...)
	cmd.Dir, cmd.Env = s.Dir, append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, s.Env...)
	cmd.ExtraFiles = s.Files
	if s.Log != nil { // a nil *os.File in the interface would not be nil
		cmd.Stdout, cmd.Stderr = s.Log, s.Log
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: s.Namespaces}
	if s.Cgroup != "" {
		dir, err := os.Open(s.Cgroup)
		if err != nil {
			return nil, fmt.Errorf("start %s in its cgroup: %w", s.Path, err)
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", s.Path, err)
	}
	p, err := open(cmd.Process.Pid)
	if err == nil {
		err = expendable(cmd.Process.Pid)
	}
	if err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		return nil, fmt.Errorf("start %s: %w", s.Path, err)
	}
	p.cmd = cmd
	go p.wait()
	return p, nil
}

// Find returns the process if it still runs; otherwise an error that wraps fs.ErrNotExist.
func Find(id Identity) (*Process, error) {
	p, err := find(id)
	if err != nil {
		return nil, err
	}
	go p.wait()
	return p, nil
}

// find returns the process, whose descriptor is for its caller to close.
func find(id Identity) (*Process, error) {
	p, err := open(id.PID)
	if err != nil {
		return nil, err
	}
	// Compared after the descriptor was opened: it can't have changed hands since.
	if p.identity != id {
		p.pidfd.Close()
		return nil, fmt.Errorf("process %d is another one now: %w", id.PID, fs.ErrNotExist)
	}
	return p, nil
}

// closeOnExec marks, once, the descriptors that this process itself was started with; Go marks all
// that it opens.
var closeOnExec = sync.OnceValue(func() error {
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("mark inherited descriptors: %w", err)
	}
	return nil
})

// SavedPath is where the identity of the process of this folder is kept.
func SavedPath(dir string) string { return filepath.Join(dir, "process.json") }

// Save writes the identity into the process's folder.
func (p *Process) Save(dir string) error {
	data, err := json.Marshal(p.identity)
	if err != nil {
		return err
	}
	return atomicfile.Write(SavedPath(dir), data, 0o600)
}

// Load finds the process whose identity was saved in the folder. The error wraps fs.ErrNotExist if it,
// or the file, is gone.
func Load(dir string) (*Process, error) {
	id, err := saved(dir)
	if err != nil {
		return nil, err
	}
	return Find(id)
}

// saved reads the identity that was saved in the folder.
func saved(dir string) (id Identity, err error) {
	path := SavedPath(dir)
	data, err := os.ReadFile(path)
	if err != nil {
		return id, err
	}
	if err := json.Unmarshal(data, &id); err != nil {
		return id, fmt.Errorf("%s: %w", path, err)
	}
	return id, nil
}

// KillIn ends the process that was started in the folder, whatever program it is and whether or not that
// answers anybody, and returns when it is gone. One whose identity was not saved, because the daemon was
// killed meanwhile, is known by its working directory. It is idempotent.
func KillIn(ctx context.Context, dir string) error {
	p, err := Load(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(SavedPath(dir)); err == nil {
			return nil // the process has ended
		}
		return killUnsaved(ctx, dir)
	}
	if err != nil {
		return fmt.Errorf("find the process of %s: %w", dir, err)
	}
	return p.Kill(ctx)
}

// killUnsaved ends the processes that work in the folder.
func killUnsaved(ctx context.Context, dir string) error {
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		return err
	}
	works := func(link string) bool {
		cwd, err := os.Readlink(link)
		return err == nil && cwd == filepath.Clean(dir)
	}
	for _, link := range links {
		if !works(link) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link)))
		if err != nil {
			return err
		}
		p, err := open(pid)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if !works(link) { // the number has changed hands before the descriptor was opened
			p.pidfd.Close()
			continue
		}
		go p.wait()
		if err := p.Kill(ctx); err != nil {
			return err
		}
	}
	return nil
}

func open(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("process %d: %w", pid, fs.ErrNotExist)
	}
	if err != nil {
		return nil, fmt.Errorf("process %d: pidfd_open: %w", pid, err)
	}
	pidfd := os.NewFile(uintptr(fd), "pidfd")
	start, err := startTime(pid)
	if err != nil {
		pidfd.Close()
		return nil, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		pidfd.Close()
		return nil, err
	}
	id := Identity{PID: pid, Start: start, Boot: string(bytes.TrimSpace(boot))}
	return &Process{identity: id, pidfd: pidfd, done: make(chan struct{})}, nil
}

// startTime reads field 22 of /proc/PID/stat; the second field may contain anything but ends at
// the last parenthesis.
func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, unix.ESRCH) {
		err = fs.ErrNotExist
	}
	if err != nil { // not always that there is none: the daemon may be out of descriptors
		return 0, fmt.Errorf("process %d: %w", pid, err)
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("process %d: malformed stat", pid)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// wait waits on the runtime's poller until the descriptor says that the process has ended.
func (p *Process) wait() {
	defer close(p.done)
	defer p.pidfd.Close()
	raw, err := p.pidfd.SyscallConn()
	if err == nil {
		err = raw.Read(func(fd uintptr) bool {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0 || err != nil && err != unix.EINTR
		})
	}
	if p.cmd != nil {
		err = p.cmd.Wait()
	}
	p.err = err
}

// Identity is what Find needs.
func (p *Process) Identity() Identity { return p.identity }

// PID is its number.
func (p *Process) PID() int { return p.identity.PID }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is the exit status of an own child as an *exec.ExitError, once Done is closed. It is nil for
// status 0, and for a process that was found, whose status nobody tells.
func (p *Process) Err() error {
	<-p.done
	return p.err
}

// Enter runs f in namespaces of the process, CLONE_NEW*, on the calling thread, which stays there: it must
// be locked to its goroutine, and end with it.
func (p *Process) Enter(namespaces int, f func() error) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // a mount namespace changes the working directory
		return fmt.Errorf("unshare: %w", err)
	}
	var entered error
	if err := raw.Control(func(fd uintptr) { entered = unix.Setns(int(fd), namespaces) }); err != nil {
		return err
	}
	if entered != nil {
		return fmt.Errorf("setns: %w", entered)
	}
	return f()
}

// Kill ends the process and returns when it is gone. It is idempotent.
func (p *Process) Kill(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	err := p.signal(unix.SIGKILL)
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("kill process %d: %w", p.PID(), errors.Join(ctx.Err(), err))
	}
}

func (p *Process) signal(s unix.Signal) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := raw.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), s, nil, 0) }); err != nil {
		return err
	}
	return sent
}
