package guest

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// execStart bounds the start of a process in a container.
const execStart = 2 * time.Minute

// exec serves a stream that is a process in a container.
func (a *Agent) exec(conn net.Conn, h agent.Header) error {
	c, err := a.container(h.Container)
	if err != nil {
		return refuse(conn, err)
	}
	if _, ok := c.running(); !ok {
		return refuse(conn, fmt.Errorf("container %s does not run: %w", c.id, errdefs.ErrFailedPrecondition))
	}
	s, p, err := c.startExec(h)
	if err != nil {
		return refuse(conn, err)
	}
	defer s.close()
	// After this the process is collected by the reaper alone.
	defer a.reaper.kill(p.pid, p.ended, unix.SIGKILL)
	if err := agent.WriteMessage(conn, agent.Reply{}); err != nil {
		return err
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		r := agent.NewFrameReader(conn)
		for {
			t, body, err := r.Read()
			if err != nil || s.handle(t, body) != nil {
				return
			}
		}
	}()
	w := agent.NewFrameWriter(conn)
	var outputs sync.WaitGroup
	for f, t := range map[*os.File]agent.FrameType{s.stdout: agent.FrameStdout, s.stderr: agent.FrameStderr, s.console: agent.FrameStdout} {
		if f != nil {
			outputs.Go(func() { read(f, func(b []byte) error { return w.Write(t, b) }) })
		}
	}
	select {
	case e := <-p.ended:
		s.ended()
		outputs.Wait()
		return sendExit(w, e.code())
	case <-gone:
		return nil
	}
}

// startExec has crun start the process. It holds what the start needs for no longer than it takes.
func (c *container) startExec(h agent.Header) (*stdio, spawned, error) {
	process, err := execProcess(c.process, h)
	if err != nil {
		return nil, spawned{}, err
	}
	dir, err := os.MkdirTemp(c.a.path("crun"), "exec-")
	if err != nil {
		return nil, spawned{}, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "process.json")
	if err := os.WriteFile(file, process, 0o600); err != nil {
		return nil, spawned{}, err
	}
	s := &stdio{theirs: make([]*os.File, 3)}
	if !h.TTY {
		if s, err = openPipes(h.Stdin, h.Stdout, h.Stderr); err != nil {
			return nil, spawned{}, err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), execStart)
	defer cancel()
	p, err := c.a.spawn(ctx, dir, h.TTY, s, []string{"exec", "--detach", "--process=" + file}, []string{c.id})
	if err != nil {
		s.close()
		return nil, spawned{}, c.notRunning(err)
	}
	return s, p, nil
}

// notRunning prefers the reason that the container has exited over what crun makes of it.
func (c *container) notRunning(err error) error {
	if c.now().State == agent.State_STATE_EXITED {
		return fmt.Errorf("container %s has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	return err
}
