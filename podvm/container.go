package podvm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// Container is a container in a pod's VM. Its methods may be called concurrently.
type Container struct {
	id       string
	pod      *Pod
	created  time.Time
	record   *saved[containerRecord]
	change   semaphore     // held by whoever changes the container
	starting semaphore     // held while it is started: its end is told after its beginning
	exiting  atomic.Bool   // its exit was reported and is being handled
	asked    atomic.Bool   // this daemon has sent it its stop signal
	exited   chan struct{} // closed when the state is Exited
	logged   chan struct{} // closed when no more output is moved to the log

	mu     sync.Mutex
	log    *logWriter // nil until it was opened
	endLog func()     // ends the moving of output to the log; nil before it began
}

// ID is 64 hex digits.
func (c *Container) ID() string { return c.id }

// Pod is the pod that it is in.
func (c *Container) Pod() *Pod { return c.pod }

// Status is a snapshot. It never waits.
func (c *Container) Status() ContainerStatus {
	r := c.record.now()
	return ContainerStatus{
		ID: c.id, Pod: c.pod.id, Config: r.Config, State: r.State, Created: r.Created, Started: r.Started, Finished: r.Finished,
		ExitCode: r.ExitCode, Reason: r.Reason, Message: r.Message, LogPath: c.logFile(), ImageRef: r.ImageRef, PID: r.PID, User: r.User, Phases: r.Phases,
	}
}

// logFile is the absolute path of the container's log, "" if it has none.
func (c *Container) logFile() string {
	dir, path := c.pod.record.now().Config.LogDir, c.record.now().Config.LogPath
	if dir == "" || path == "" {
		return ""
	}
	return filepath.Join(dir, path)
}

// containerOf makes a container of its record.
func (p *Pod) containerOf(r containerRecord) *Container {
	l := p.m.layout
	c := &Container{
		id: r.ID, pod: p, created: r.Created, record: newSaved(l.container(p.id, r.ID), r),
		change: make(semaphore, 1), starting: make(semaphore, 1),
		exited: make(chan struct{}), logged: make(chan struct{}),
	}
	if r.State == Exited {
		close(c.exited)
	}
	return c
}

// add makes a container visible, unless its VM has ended meanwhile: then it has ended, too.
func (p *Pod) add(c *Container) {
	p.m.mu.Lock()
	p.m.containers[c.id] = c
	p.m.mu.Unlock()
	p.mu.Lock()
	p.containers[c.id] = c
	p.mu.Unlock()
	if r := p.record.now(); r.Stage == stopped {
		c.endedWithVM(r.Reason, r.Message)
	}
}

// forget makes a container unknown.
func (c *Container) forget() {
	m := c.pod.m
	m.mu.Lock()
	delete(m.containers, c.id)
	m.mu.Unlock()
	c.pod.mu.Lock()
	delete(c.pod.containers, c.id)
	c.pod.mu.Unlock()
	m.events.send(Event{Kind: EventDeleted, Pod: c.pod.Status(), Container: c.Status()})
}

func (c *Container) removeFiles() error {
	return errors.Join(c.record.remove(), remove(c.pod.m.layout.logPosition(c.pod.id, c.id)))
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
	ended := c.pod.m.pool.use()
	return ctx, func() { ended(); c.change.unlock(); cancel() }, nil
}

// Start runs a created container.
func (c *Container) Start(ctx context.Context) error {
	ctx, done, err := c.begin(ctx, opLimit)
	if err != nil {
		return err
	}
	defer done()
	if err := c.starting.lock(ctx); err != nil {
		return err
	}
	defer c.starting.unlock()
	if s := c.record.now().State; s != Created {
		return c.in(s, "start")
	}
	rpc, err := c.pod.rpc(ctx)
	if err != nil {
		return fmt.Errorf("start container %s: %w", c.id, err)
	}
	r, err := rpc.Start(ctx, &agent.StartRequest{Id: c.id})
	if err != nil {
		if !unclear(err) {
			c.ended(time.Now(), startErrorCode, "StartError", printable(err.Error()))
		}
		return fmt.Errorf("start container %s: %w", c.id, err)
	}
	c.begun(guestTime(r.StartedNs, c.created), r.Pid)
	return nil
}

// startErrorCode is the exit code of a container whose command could not be run, as containerd has it.
const startErrorCode = 128

// unclear tells of an error of a call that it may have succeeded, or did before: Watch will tell.
func unclear(err error) bool {
	return errors.Is(err, errdefs.ErrUnavailable) || errors.Is(err, errdefs.ErrFailedPrecondition) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// begun records that the container runs. It needs the starting lock.
func (c *Container) begun(at time.Time, pid uint32) {
	changed, err := c.record.update(func(r *containerRecord) bool {
		if r.State != Created {
			return false // its VM has ended
		}
		r.State, r.Started, r.PID = Running, at, pid
		return true
	})
	c.pod.note("record that a container runs", err)
	if changed {
		slog.Info("container started", "pod", c.pod.id, "container", c.id)
		c.pod.m.events.send(Event{Kind: EventStarted, Pod: c.pod.Status(), Container: c.Status()})
	}
}

// killLimit is how long a killed container may take to end.
const killLimit = 30 * time.Second

// Stop sends the stop signal, unless an earlier call has, and SIGKILL to all its processes after the grace
// period. It returns when the container has ended; a container that has is no error.
func (c *Container) Stop(ctx context.Context, grace time.Duration) error {
	ctx, cancel := operation(ctx, grace+killLimit)
	defer cancel()
	return c.stop(ctx, grace)
}

func (c *Container) stop(ctx context.Context, grace time.Duration) error {
	switch c.record.now().State {
	case Exited:
		return nil
	case Created:
		grace = 0 // nothing of it has run
	}
	if grace > 0 {
		if over, err := c.ask(ctx); over || err != nil {
			return err
		}
		select {
		case <-c.exited:
			return nil
		case <-time.After(grace):
		case <-ctx.Done():
		}
	}
	if over, err := c.signal(ctx, unix.SIGKILL, true); over || err != nil {
		return err
	}
	select {
	case <-c.exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("container %s has not ended after SIGKILL: stop its pod: %w", c.id, ctx.Err())
	}
}

// ask sends the stop signal once, however often the kubelet asks: many programs take a second one as an order
// to end at once. A daemon that was started since does not know of the first, and sends one more.
func (c *Container) ask(ctx context.Context) (over bool, err error) {
	number, err := signalNumber(c.record.now().StopSignal)
	if err != nil {
		return false, fmt.Errorf("stop container %s: %w", c.id, err)
	}
	if !c.asked.CompareAndSwap(false, true) {
		return false, nil
	}
	if over, err = c.signal(ctx, number, false); err != nil {
		c.asked.Store(false)
	}
	return over, err
}

// signal sends a signal. When it can't because the container, or its VM, just ended, over is true.
func (c *Container) signal(ctx context.Context, number unix.Signal, all bool) (over bool, err error) {
	rpc, err := c.pod.rpc(ctx)
	if err == nil {
		_, err = rpc.Signal(ctx, &agent.SignalRequest{Id: c.id, Signal: int32(number), All: all})
	}
	if err == nil {
		return false, nil
	}
	select { // the end of a VM breaks its streams before it is known
	case <-c.exited:
		return true, nil
	case <-time.After(time.Second):
	case <-ctx.Done():
	}
	return false, fmt.Errorf("send %s to container %s: %w", unix.SignalName(number), c.id, err)
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
	if n, ok := otherSignals[upper]; ok {
		return n, nil
	}
	if n := unix.SignalNum(upper); n != 0 {
		return n, nil
	}
	if n, ok := realTime(upper, "SIGRTMIN+"); ok {
		return signalRTMin + n, nil
	}
	if n, ok := realTime(upper, "SIGRTMAX-"); ok {
		return signalRTMax - n, nil
	}
	return 0, fmt.Errorf("signal %q: %w", name, errdefs.ErrInvalidArgument)
}

// Real-time signals, as the C library numbers them.
const (
	signalRTMin unix.Signal = 34
	signalRTMax unix.Signal = 64
)

// otherSignals are names that package unix does not know.
var otherSignals = map[string]unix.Signal{
	"SIGCLD": unix.SIGCHLD, "SIGPOLL": unix.SIGIO, "SIGIOT": unix.SIGABRT, "SIGRTMIN": signalRTMin, "SIGRTMAX": signalRTMax,
}

// realTime reads a real-time signal that is counted from the first or the last.
func realTime(name, from string) (unix.Signal, bool) {
	text, ok := strings.CutPrefix(name, from)
	n, err := strconv.ParseUint(text, 10, 8)
	return unix.Signal(n), ok && err == nil && unix.Signal(n) <= signalRTMax-signalRTMin
}

// Remove removes the container; one that runs is killed first.
func (c *Container) Remove(ctx context.Context) error {
	ctx, done, err := c.begin(ctx, opLimit)
	if err != nil {
		return err
	}
	defer done()
	if c.pod.running() {
		if err := c.removeFromGuest(ctx); err != nil && c.pod.running() {
			return fmt.Errorf("remove container %s: %w", c.id, err)
		}
	}
	if err := errors.Join(c.closeLog(), c.removeFiles()); err != nil {
		return fmt.Errorf("remove container %s: %w", c.id, err)
	}
	c.forget()
	slog.Info("container removed", "pod", c.pod.id, "container", c.id)
	return nil
}

func (c *Container) removeFromGuest(ctx context.Context) error {
	if err := c.stop(ctx, 0); err != nil {
		return err
	}
	c.drain(ctx)
	rpc, err := c.pod.rpc(ctx)
	if err == nil {
		_, err = rpc.Remove(ctx, &agent.RemoveRequest{Id: c.id})
	}
	return err
}

// Update changes the limits of a container, and the VM's size with them. More than the VM can have is
// errdefs.ErrOutOfRange.
func (c *Container) Update(ctx context.Context, r Resources) error {
	ctx, done, err := c.begin(ctx, opLimit)
	if err != nil {
		return err
	}
	defer done()
	if err := c.update(ctx, r); err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	return nil
}

func (c *Container) update(ctx context.Context, change Resources) error {
	if s := c.record.now().State; s != Created && s != Running {
		return c.in(s, "update")
	}
	rpc, err := c.pod.rpc(ctx)
	if err != nil {
		return err
	}
	before := c.record.now().Config.Resources
	merged := before.merge(change)
	data, err := linuxResources(merged)
	if err != nil {
		return err
	}
	if err := c.pod.change.lock(ctx); err != nil {
		return err
	}
	defer c.pod.change.unlock()
	want := c.pod.sizeAfter(c, merged)
	if err := c.pod.allow(c.pod.sizeFor(c.pod.record.now().Config, c.pod.limits("")), want); err != nil {
		return err
	}
	size := c.pod.within(want)
	if err := c.pod.growTo(ctx, size); err != nil {
		return err
	}
	if _, err := rpc.Update(ctx, &agent.UpdateRequest{Id: c.id, Resources: data}); err != nil {
		return err
	}
	if err := c.pod.resize(ctx, size); err != nil { // what it gives back
		return err
	}
	warnPinned(c.id, before, merged)
	c.pod.note("record a container's resources", c.record.set(func(r *containerRecord) { r.Config.Resources = merged }))
	return nil
}

// merge is r with what is set in the change, but for the score of the OOM killer, which a process has
// from its start. A limit of memory alone says of swap that there is none, as at the creation: what was
// there before may be less than the memory now.
func (r Resources) merge(change Resources) Resources {
	if change.Memory != 0 {
		r.MemorySwap = 0
	}
	for _, f := range []struct{ to, from *int64 }{
		{&r.CPUPeriod, &change.CPUPeriod},
		{&r.CPUQuota, &change.CPUQuota},
		{&r.CPUShares, &change.CPUShares},
		{&r.Memory, &change.Memory},
		{&r.MemorySwap, &change.MemorySwap},
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
	r.HugepageLimits = mergeMaps(r.HugepageLimits, change.HugepageLimits)
	r.Unified = mergeMaps(r.Unified, change.Unified)
	return r
}

func mergeMaps[V any](old, change map[string]V) map[string]V {
	if len(change) == 0 {
		return old
	}
	merged := maps.Clone(change)
	for key, value := range old {
		if _, ok := change[key]; !ok {
			merged[key] = value
		}
	}
	return merged
}
