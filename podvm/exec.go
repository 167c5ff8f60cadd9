package podvm

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// ExecConfig is a command to be run in a container.
type ExecConfig struct {
	Command []string
	TTY     bool
}

// Exec runs a command in a running container and returns its exit code. It ends with ctx. Nothing
// is recorded: a command does not outlive its caller.
func (c *Container) Exec(ctx context.Context, e ExecConfig, stdio agent.IO) (int32, error) {
	if s := c.Status().State; s != Running {
		return 0, c.in(s, "exec in")
	}
	var process specs.Process
	if err := json.Unmarshal(c.record.Process, &process); err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	process.Args, process.Terminal, process.ConsoleSize = e.Command, e.TTY, nil
	data, err := json.Marshal(process)
	if err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	code, err := c.pod.client.Exec(ctx, agent.Exec{Container: c.id, Process: data, TTY: e.TTY}, stdio)
	if err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	return code, nil
}

// Attach joins the container's own process.
func (c *Container) Attach(ctx context.Context, stdio agent.IO) error {
	s := c.Status()
	if s.State != Running && s.State != Created {
		return c.in(s.State, "attach to")
	}
	if err := c.pod.client.Attach(ctx, c.id, s.Config.TTY, stdio); err != nil {
		return fmt.Errorf("attach to container %s: %w", c.id, err)
	}
	return nil
}

// openLog begins to move the container's output to its log. Without a log it is dropped.
func (c *Container) openLog() error {
	w, err := newLogWriter(c.logFile(), c.pod.m.layout.logPosition(c.pod.id, c.id))
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.log = w
	c.mu.Unlock()
	c.followLog()
	return nil
}

// followLog moves output until all of it is there, or the pod is let go.
func (c *Container) followLog() {
	c.mu.Lock()
	w := c.log
	c.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	c.pod.onDetach(cancel)
	go func() {
		defer cancel()
		if err := pump(ctx, c.pod.client, c.id, w); err != nil {
			if ctx.Err() == nil {
				slog.Error("container log", "container", c.id, "err", err)
			}
			return
		}
		close(c.logged)
	}()
}

// ReopenLog makes the log's next line go to a new file, after the kubelet renamed the old one.
func (c *Container) ReopenLog(context.Context) error {
	if s := c.Status().State; s != Running {
		return c.in(s, "reopen the log of")
	}
	c.mu.Lock()
	w := c.log
	c.mu.Unlock()
	if err := w.reopen(); err != nil {
		return fmt.Errorf("reopen the log of container %s: %w", c.id, err)
	}
	return nil
}

func (c *Container) closeLog() {
	c.mu.Lock()
	w := c.log
	c.mu.Unlock()
	if w == nil {
		return
	}
	if err := w.close(); err != nil {
		slog.Warn("close container log", "container", c.id, "err", err)
	}
}
