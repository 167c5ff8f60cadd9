package podvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/state"
)

// Container is a container in a pod's VM. Its methods may be called concurrently.
type Container struct {
	id      string
	pod     *Pod
	created time.Time
	change  semaphore     // held by whoever changes the container
	exited  chan struct{} // closed when the state is Exited
	logged  chan struct{} // closed when all its output is in the log

	mu      sync.Mutex
	record  containerRecord
	log     *logWriter // nil: it has no log
	exiting bool       // its exit was reported and is being handled
}

// ID is 64 hex digits.
func (c *Container) ID() string { return c.id }

// Pod is the pod that it is in.
func (c *Container) Pod() *Pod { return c.pod }

// Status is a snapshot. It never waits.
func (c *Container) Status() ContainerStatus {
	path := c.logFile()
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.record
	return ContainerStatus{
		ID: c.id, Pod: c.pod.id, Config: r.Config, State: r.State, Created: r.Created, Started: r.Started, Finished: r.Finished,
		ExitCode: r.ExitCode, Reason: r.Reason, Message: r.Message, LogPath: path, ImageRef: r.ImageRef, PID: r.PID, User: r.User,
	}
}

func (c *Container) save() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.saveLocked()
}

func (c *Container) saveLocked() error {
	return state.Write(c.pod.m.layout.container(c.pod.id, c.id), c.record)
}

func (c *Container) removeFiles() error {
	l := c.pod.m.layout
	var errs []error
	for _, path := range []string{l.container(c.pod.id, c.id), l.logPosition(c.pod.id, c.id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// in is an error of a container that is in the wrong state.
func (c *Container) in(s State, what string) error {
	return fmt.Errorf("%s container %s: it is %s: %w", what, c.id, s, errdefs.ErrFailedPrecondition)
}

// begin takes the change lock for an operation of the daemon's own.
func (c *Container) begin(ctx context.Context, limit time.Duration) (context.Context, func(), error) {
	ctx, cancel := operation(ctx, limit)
	if err := c.change.lock(ctx); err != nil {
		cancel()
		return nil, nil, err
	}
	return ctx, func() { c.change.unlock(); cancel() }, nil
}

// Start runs a created container.
func (c *Container) Start(ctx context.Context) error {
	ctx, done, err := c.begin(ctx, opLimit)
	if err != nil {
		return err
	}
	defer done()
	if s := c.Status().State; s != Created {
		return c.in(s, "start")
	}
	rpc, err := c.pod.rpc(ctx)
	if err != nil {
		return fmt.Errorf("start container %s: %w", c.id, err)
	}
	r, err := rpc.Start(ctx, &agent.StartRequest{Id: c.id})
	if err != nil {
		c.ended(time.Now(), 128, "StartError", printable(err.Error()))
		return fmt.Errorf("start container %s: %w", c.id, err)
	}
	c.mu.Lock()
	c.record.Started, c.record.PID = guestTime(r.StartedNs, c.created), r.Pid
	if c.record.State == Created { // else it has ended already
		c.record.State = Running
	}
	err = c.saveLocked()
	c.mu.Unlock()
	if err != nil {
		return err
	}
	slog.Info("container started", "pod", c.pod.id, "container", c.id)
	c.pod.m.events.send(Event{Kind: EventStarted, Pod: c.pod.Status(), Container: c.Status()})
	return nil
}

// killLimit is how long a killed container may take to end.
const killLimit = 30 * time.Second

// Stop sends the stop signal, and SIGKILL to all its processes after the grace period. It returns
// when the container has ended; a container that has is no error.
func (c *Container) Stop(ctx context.Context, grace time.Duration) error {
	ctx, cancel := operation(ctx, grace+killLimit)
	defer cancel()
	switch c.Status().State {
	case Exited:
		return nil
	case Created, Unknown:
		grace = 0 // nothing of it has run
	}
	rpc, err := c.pod.rpc(ctx)
	if err != nil {
		if c.Status().State == Exited {
			return nil
		}
		return fmt.Errorf("stop container %s: %w", c.id, err)
	}
	if grace > 0 {
		number, err := signalNumber(c.record.StopSignal)
		if err != nil {
			return fmt.Errorf("stop container %s: %w", c.id, err)
		}
		if _, err := rpc.Signal(ctx, &agent.SignalRequest{Id: c.id, Signal: int32(number)}); err != nil && !c.over() {
			return fmt.Errorf("stop container %s: %w", c.id, err)
		}
		select {
		case <-c.exited:
			return nil
		case <-time.After(grace):
		}
	}
	if _, err := rpc.Signal(ctx, &agent.SignalRequest{Id: c.id, Signal: int32(unix.SIGKILL), All: true}); err != nil && !c.over() {
		return fmt.Errorf("kill container %s: %w", c.id, err)
	}
	select {
	case <-c.exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("container %s has not ended after SIGKILL: stop its pod: %w", c.id, ctx.Err())
	}
}

func (c *Container) over() bool {
	select {
	case <-c.exited:
		return true
	default:
		return false
	}
}

// signalNumber reads "SIGTERM", "TERM" or "15"; "" is SIGTERM.
func signalNumber(name string) (unix.Signal, error) {
	if name == "" {
		return unix.SIGTERM, nil
	}
	if n, err := strconv.Atoi(name); err == nil && n > 0 && n <= 64 {
		return unix.Signal(n), nil
	}
	upper := "SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG")
	if n := unix.SignalNum(upper); n != 0 {
		return n, nil
	}
	base, offset, ok := strings.Cut(upper, "+")
	if n, err := strconv.Atoi(offset); ok && err == nil && base == "SIGRTMIN" && n >= 0 && n <= 30 {
		return unix.Signal(34 + n), nil
	}
	if base, offset, ok = strings.Cut(upper, "-"); ok && base == "SIGRTMAX" {
		if n, err := strconv.Atoi(offset); err == nil && n >= 0 && n <= 30 {
			return unix.Signal(64 - n), nil
		}
	}
	return 0, fmt.Errorf("signal %q: %w", name, errdefs.ErrInvalidArgument)
}

// Remove removes the container; one that runs is killed first.
func (c *Container) Remove(ctx context.Context) error {
	ctx, done, err := c.begin(ctx, opLimit)
	if err != nil {
		return err
	}
	defer done()
	if c.pod.machine() != nil {
		if err := c.Stop(ctx, 0); err != nil && !errors.Is(err, errdefs.ErrFailedPrecondition) {
			return err
		}
		if rpc, err := c.pod.rpc(ctx); err == nil {
			if _, err := rpc.Remove(ctx, &agent.RemoveRequest{Id: c.id}); err != nil && c.pod.machine() != nil {
				return fmt.Errorf("remove container %s: %w", c.id, err)
			}
		}
	}
	if err := c.removeFiles(); err != nil {
		return fmt.Errorf("remove container %s: %w", c.id, err)
	}
	c.closeLog()
	c.pod.m.forgetContainer(c)
	slog.Info("container removed", "pod", c.pod.id, "container", c.id)
	c.pod.m.events.send(Event{Kind: EventDeleted, Pod: c.pod.Status(), Container: c.Status()})
	return nil
}

// Update changes the limits of a container, and the VM's size with them.
func (c *Container) Update(ctx context.Context, r Resources) error {
	ctx, done, err := c.begin(ctx, opLimit)
	if err != nil {
		return err
	}
	defer done()
	if s := c.Status().State; s != Created && s != Running {
		return c.in(s, "update")
	}
	rpc, err := c.pod.rpc(ctx)
	if err != nil {
		return err
	}
	if err := c.pod.change.lock(ctx); err != nil {
		return err
	}
	defer c.pod.change.unlock()
	merged := c.Status().Config.Resources.merge(r)
	if err := c.pod.growWithout(ctx, c.id, merged); err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	data, err := linuxResources(merged)
	if err != nil {
		return err
	}
	if _, err := rpc.Update(ctx, &agent.UpdateRequest{Id: c.id, Resources: data}); err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	c.mu.Lock()
	c.record.Config.Resources = merged
	err = c.saveLocked()
	c.mu.Unlock()
	return err
}

// merge is r with what is set in the change.
func (r Resources) merge(change Resources) Resources {
	for _, f := range []struct{ to, from *int64 }{
		{&r.CPUPeriod, &change.CPUPeriod},
		{&r.CPUQuota, &change.CPUQuota},
		{&r.CPUShares, &change.CPUShares},
		{&r.Memory, &change.Memory},
		{&r.MemorySwap, &change.MemorySwap},
		{&r.OOMScoreAdj, &change.OOMScoreAdj},
	} {
		if *f.from != 0 {
			*f.to = *f.from
		}
	}
	if change.CPUSetCPUs != "" {
		r.CPUSetCPUs = change.CPUSetCPUs
	}
	if change.CPUSetMems != "" {
		r.CPUSetMems = change.CPUSetMems
	}
	if change.HugepageLimits != nil {
		r.HugepageLimits = change.HugepageLimits
	}
	if change.Unified != nil {
		r.Unified = change.Unified
	}
	return r
}
