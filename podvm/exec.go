package podvm

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

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
	r := c.record.now()
	if r.State != Running {
		return 0, c.in(r.State, "exec in")
	}
	c.pod.m.pool.use()() // it may go on for long
	var process specs.Process
	if err := json.Unmarshal(r.Process, &process); err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	process.Args, process.Terminal, process.ConsoleSize = e.Command, e.TTY, nil
	if e.TTY {
		process.Env = withTerm(process.Env)
	}
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

// withTerm names a terminal where the environment names none, as that of a container without one does.
func withTerm(env []string) []string {
	if slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, "TERM=") }) {
		return env
	}
	return append(env, "TERM=xterm")
}

// Attach joins the container's own process.
func (c *Container) Attach(ctx context.Context, stdio agent.IO) error {
	r := c.record.now()
	if r.State != Running && r.State != Created {
		return c.in(r.State, "attach to")
	}
	if err := c.pod.client.Attach(ctx, c.id, r.Config.TTY, stdio); err != nil {
		return fmt.Errorf("attach to container %s: %w", c.id, err)
	}
	return nil
}
