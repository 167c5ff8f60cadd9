package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// podPID is the PID namespace that a pod's containers share, held by a process of its own.
type podPID struct {
	agent *Agent
	turn  chan struct{}
	pid   int
}

// path returns the namespace, making it on first use.
func (p *podPID) path(ctx context.Context) (string, error) {
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { <-p.turn }()
	if p.pid == 0 {
		pid, err := p.agent.pause(ctx)
		if err != nil {
			return "", fmt.Errorf("make the pod's PID namespace: %w", err)
		}
		p.pid = pid
	}
	return nsOf(p.pid), nil
}

// pause starts the process that holds the namespace, and waits until containers may see it.
func (a *Agent) pause(ctx context.Context) (pid int, err error) {
	theirs, ours, err := pipe(0)
	if err != nil {
		return 0, err
	}
	defer ours.Close()
	argv := []string{"/proc/self/exe", PauseArg}
	pid, ended, err := a.reaper.start(argv, nil, []*os.File{nil, theirs, theirs},
		&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS})
	theirs.Close()
	if err != nil {
		return 0, err
	}
	defer context.AfterFunc(ctx, func() { ours.SetReadDeadline(time.Unix(1, 0)) })()
	said, err := io.ReadAll(io.LimitReader(ours, errorMax))
	if err != nil || string(said) != enclosed {
		return 0, errors.Join(fmt.Errorf("%s: %q", PauseArg, said), err, context.Cause(ctx), a.reaper.kill(pid, ended, unix.SIGKILL))
	}
	return pid, nil
}

func nsOf(pid int) string { return fmt.Sprintf("/proc/%d/ns/pid", pid) }

// PauseArg is the argument with which the agent's program is to call Pause.
const PauseArg = "pause"

// enclosed is all that Pause says when it is ready.
const enclosed = "enclosed"

// Pause is the first process of a pod's PID namespace: it holds the namespace, collects what its
// other processes leave behind, and never returns. It has mounts of its own.
func Pause() {
	signal.Ignore() // children among them: the kernel then reaps them
	withstand()
	debug.SetGCPercent(-1) // it leaves no garbage, and to look for some every two minutes has each clone copy it
	if err := enclose(); err != nil {
		fmt.Print(err)
		os.Exit(1)
	}
	fmt.Print(enclosed)
	if err := errors.Join(os.Stdout.Close(), os.Stderr.Close()); err != nil {
		os.Exit(1)
	}
	for {
		unix.Poll(nil, -1)
	}
}

// enclose gives up files and rights: a container that may trace processes of its PID namespace has
// what this one has, and sees its root directory.
func enclose() error {
	const dir = "/tmp"
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("empty", dir, "tmpfs", unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount an empty root: %w", err)
	}
	if err := unix.Chdir(dir); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("enter an empty root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the guest's root: %w", err)
	}
	const nobody = 65534
	return errors.Join(unix.Chdir("/"), syscall.Setgroups(nil), syscall.Setgid(nobody), syscall.Setuid(nobody))
}

// pidNamespace finds the container's PID namespace as the request wants it; nil is the guest's own.
func (a *Agent) pidNamespace(ctx context.Context, req *agent.CreateRequest) (*specs.LinuxNamespace, error) {
	ns := &specs.LinuxNamespace{Type: specs.PIDNamespace}
	switch {
	case req.GuestPid:
		return nil, nil
	case req.TargetPid != "":
		target, err := a.container(req.TargetPid)
		if err != nil {
			return nil, err
		}
		pid, ok := target.running()
		if !ok {
			return nil, fmt.Errorf("container %s, whose processes are to be seen, does not run: %w", req.TargetPid, errdefs.ErrFailedPrecondition)
		}
		ns.Path = nsOf(pid)
	case req.SharePid:
		path, err := a.pid.path(ctx)
		if err != nil {
			return nil, err
		}
		ns.Path = path
	}
	return ns, nil
}
