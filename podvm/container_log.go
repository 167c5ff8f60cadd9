package podvm

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"
)

// ReopenLog makes the log's next line go to a new file, after the kubelet renamed the old one.
func (c *Container) ReopenLog(context.Context) error {
	if s := c.record.now().State; s != Running {
		return c.in(s, "reopen the log of")
	}
	c.mu.Lock()
	w := c.log
	c.mu.Unlock()
	if w == nil {
		return fmt.Errorf("reopen the log of container %s: it could not be opened yet: %w", c.id, errdefs.ErrUnavailable)
	}
	if err := w.reopen(); err != nil {
		return fmt.Errorf("reopen the log of container %s: %w", c.id, err)
	}
	return nil
}

// openLog opens the container's log where it stands. Without a log its output is dropped.
func (c *Container) openLog() error {
	w, err := newLogWriter(c.logFile(), c.pod.m.layout.logPosition(c.pod.id, c.id))
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log = w
	return nil
}

// followOutput begins to move the container's output to its log.
func (c *Container) followOutput() {
	var began bool
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endLog, began = c.pod.tasks.start(func(ctx context.Context) {
		defer close(c.logged)
		if err := c.moveOutput(ctx); err != nil && ctx.Err() == nil {
			slog.Error("container log ends", "pod", c.pod.id, "container", c.id, "err", err)
		}
	})
	if !began {
		close(c.logged)
	}
}

// moveOutput moves output to the log until all of it is there, ctx ends, or the VM has ended.
func (c *Container) moveOutput(ctx context.Context) error {
	for told := false; ; told = true {
		c.mu.Lock()
		w := c.log
		c.mu.Unlock()
		if w != nil {
			return pump(ctx, c.pod.client, c.id, w)
		}
		err := c.openLog()
		if err == nil {
			continue
		}
		if !told {
			slog.Error("container log can't be opened; its output waits", "pod", c.pod.id, "container", c.id, "err", err)
		}
		select {
		case <-time.After(retryFull):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// closeLog ends the moving of output, and closes the log.
func (c *Container) closeLog() error {
	c.mu.Lock()
	end := c.endLog
	c.mu.Unlock()
	if end != nil {
		end()
		<-c.logged
	}
	c.mu.Lock()
	w := c.log
	c.log = nil
	c.mu.Unlock()
	if w == nil {
		return nil
	}
	return w.close()
}
