package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
	"github.com/caisson-vm/caisson/podvm/agent"
)

// maxOutput is how much of a command's output ExecSync returns, stdout and stderr together, in
// bytes: what fits into a message with its head. The rest is thrown away and the command goes on.
const maxOutput = maxMessage - 4<<10

// ExecSync runs a command to its end. One that takes longer than the timeout is killed, and the
// error is DeadlineExceeded: by that the kubelet knows that a probe timed out.
func (s *runtimeService) ExecSync(ctx context.Context, r *cri.ExecSyncRequest) (*cri.ExecSyncResponse, error) {
	c, err := s.running(r.GetContainerId(), r.GetCmd())
	if err != nil {
		return nil, err
	}
	timeout := time.Duration(min(max(r.GetTimeout(), 0), maxGrace)) * time.Second
	limited, cancel := ctx, context.CancelFunc(func() {})
	if timeout > 0 {
		limited, cancel = context.WithTimeout(ctx, timeout)
	}
	defer cancel()
	left := &budget{left: maxOutput}
	stdout, stderr := capped{budget: left}, capped{budget: left}
	code, err := c.Exec(limited, podvm.ExecConfig{Command: r.GetCmd()}, agent.IO{Stdout: &stdout, Stderr: &stderr})
	if err != nil && ctx.Err() == nil && errors.Is(limited.Err(), context.DeadlineExceeded) {
		return nil, fmt.Errorf("command %q timed out after %s: %w", strings.Join(r.GetCmd(), " "), timeout, context.DeadlineExceeded)
	}
	if err != nil {
		return nil, notItself(err)
	}
	return &cri.ExecSyncResponse{Stdout: stdout.take(), Stderr: stderr.take(), ExitCode: code}, nil
}

// Exec returns the URL at which the command starts when a client connects.
func (s *runtimeService) Exec(_ context.Context, r *cri.ExecRequest) (*cri.ExecResponse, error) {
	c, err := s.running(r.GetContainerId(), r.GetCmd())
	if err != nil {
		return nil, err
	}
	return s.streams.server.GetExec(&cri.ExecRequest{
		ContainerId: streamTarget(c, r.GetStdin()), Cmd: r.GetCmd(), Tty: r.GetTty(),
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(),
	})
}

// Attach returns the URL of a container's stdin and output.
func (s *runtimeService) Attach(_ context.Context, r *cri.AttachRequest) (*cri.AttachResponse, error) {
	c, err := s.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := checkRunning(c); err != nil {
		return nil, err
	}
	return s.streams.server.GetAttach(&cri.AttachRequest{
		ContainerId: streamTarget(c, r.GetStdin()), Tty: r.GetTty(),
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(),
	})
}

// PortForward returns the URL at which connections to the pod's ports are made.
func (s *runtimeService) PortForward(_ context.Context, r *cri.PortForwardRequest) (*cri.PortForwardResponse, error) {
	for _, port := range r.GetPort() {
		if err := checkPort(port); err != nil {
			return nil, err
		}
	}
	p, err := s.pod(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	status := p.Status()
	if status.State != podvm.Ready {
		return nil, fmt.Errorf("pod %s is %s; ports are forwarded to running pods: %w", status.ID, status.State, errdefs.ErrFailedPrecondition)
	}
	return s.streams.server.GetPortForward(&cri.PortForwardRequest{PodSandboxId: status.ID, Port: r.GetPort()})
}

// running finds a container in which the command can be run.
func (s *runtimeService) running(id string, command []string) (Container, error) {
	if len(command) == 0 {
		return nil, invalid("the command is missing")
	}
	for _, arg := range command {
		if strings.ContainsRune(arg, 0) {
			return nil, invalid("argument %q contains a NUL byte", arg)
		}
	}
	c, err := s.container(id)
	if err != nil {
		return nil, err
	}
	return c, checkRunning(c)
}

func checkRunning(c Container) error {
	status := c.Status()
	if status.State != podvm.Running {
		return fmt.Errorf("container %s is %s, not running: %w", status.ID, status.State, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func checkPort(port int32) error {
	if port < 1 || port > 65535 {
		return invalid("port %d: want 1 to 65535", port)
	}
	return nil
}

// budget is how many bytes several writers may still keep together.
type budget struct {
	mu   sync.Mutex
	left int
}

// capped keeps what its budget allows and swallows the rest. Its take may be called while a late
// writer still writes.
type capped struct {
	budget *budget
	buf    bytes.Buffer // guarded by budget.mu
}

func (c *capped) Write(p []byte) (int, error) {
	c.budget.mu.Lock()
	defer c.budget.mu.Unlock()
	n := min(len(p), c.budget.left)
	c.budget.left -= n
	c.buf.Write(p[:n])
	return len(p), nil
}

// take returns what was written and keeps nothing more.
func (c *capped) take() []byte {
	c.budget.mu.Lock()
	defer c.budget.mu.Unlock()
	c.budget.left = 0
	return c.buf.Bytes()
}
