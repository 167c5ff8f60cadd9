package guest

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

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
		argv := []string{"/proc/self/exe", PauseArg}
		pid, _, err := p.agent.reaper.start(argv, nil, make([]*os.File, 3), &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID})
		if err != nil {
			return "", fmt.Errorf("make the pod's PID namespace: %w", err)
		}
		p.pid = pid
	}
	return nsOf(p.pid), nil
}

func nsOf(pid int) string { return fmt.Sprintf("/proc/%d/ns/pid", pid) }

// PauseArg is the argument with which the agent's program is to call Pause.
const PauseArg = "pause"

// Pause is the first process of a pod's PID namespace: it holds the namespace, collects what its
// other processes leave behind, and never returns.
func Pause() {
	signal.Ignore() // children among them: the kernel then reaps them
	for {
		unix.Poll(nil, -1)
	}
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
