package podvm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// Pod is a pod in its VM. Its methods may be called concurrently; those that change it wait for one
// another, those that read never wait.
type Pod struct {
	m      *Manager
	id     string
	record *saved[podRecord]
	client *agent.Client
	change semaphore // held by whoever changes the pod
	tasks  tasks     // what follows the VM

	ranking sync.Mutex // held while it is told how expendable the pod is, so that the last one is right

	mu         sync.Mutex
	vm         vmm.VM // nil when it has none (any more)
	leaving    bool   // its VM is being ended on purpose
	containers map[string]*Container
}

// semaphore is a lock that can be waited for with a context.
type semaphore chan struct{}

func (s semaphore) lock(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for another change: %w", ctx.Err())
	}
}

func (s semaphore) tryLock() bool {
	select {
	case s <- struct{}{}:
		return true
	default:
		return false
	}
}

func (s semaphore) unlock() { <-s }

func (m *Manager) newPod(id string, c PodConfig, driver vmm.Driver) *Pod {
	return m.podOf(podRecord{ID: id, Config: c, Created: time.Now(), Stage: starting, Driver: driver.Name(), VM: m.vmConfig(id)})
}

func (m *Manager) podOf(r podRecord) *Pod {
	p := &Pod{
		m: m, id: r.ID, change: make(semaphore, 1), record: newSaved(m.layout.record(r.ID), r),
		containers: map[string]*Container{},
	}
	p.client = agent.NewClient(p)
	return p
}

// Dial implements agent.Dialer.
func (p *Pod) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	v := p.machine()
	if v == nil {
		return nil, p.notReady()
	}
	return v.Dial(ctx, port)
}

// ID is 64 hex digits.
func (p *Pod) ID() string { return p.id }

func (p *Pod) machine() vmm.VM {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.vm
}

func (p *Pod) setMachine(v vmm.VM) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.vm = v
}

// running tells whether the pod is ready and stays so.
func (p *Pod) running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.vm != nil && !p.leaving && p.record.now().Stage == ready
}

// Status is a snapshot. It never waits.
func (p *Pod) Status() PodStatus {
	r := p.record.now()
	s := PodStatus{
		ID: p.id, Config: r.Config, State: NotReady, Created: r.Created, Reason: r.Reason, Message: r.Message,
		Driver: r.Driver, Kernel: r.Kernel, Guest: r.Guest, Agent: r.Agent, Cgroup: r.VM.Cgroup, Phases: r.Phases,
	}
	if r.Network != nil {
		s.IPs, s.NetNS = r.Network.IPs(), r.Network.NetNS
	}
	p.mu.Lock()
	v, leaving := p.vm, p.leaving
	p.mu.Unlock()
	if r.Stage == ready && !leaving {
		s.State = Ready
	}
	if v != nil {
		s.VMM = v.Info()
	}
	return s
}

// Containers lists the pod's containers, the oldest first.
func (p *Pod) Containers() []*Container {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]*Container, 0, len(p.containers))
	for _, c := range p.containers {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b *Container) int { return a.created.Compare(b.created) })
	return all
}

// notReady says why the pod can't do what needs its VM.
func (p *Pod) notReady() error {
	r := p.record.now()
	reason := r.Reason
	if r.Message != "" {
		reason += ": " + r.Message
	}
	if reason == "" {
		reason = "it has no VM"
	}
	return fmt.Errorf("pod %s is not ready: %s: %w", p.id, reason, errdefs.ErrFailedPrecondition)
}

func (p *Pod) rpc(ctx context.Context) (agent.AgentClient, error) {
	if !p.running() {
		return nil, p.notReady()
	}
	return p.client.RPC(ctx)
}

// Stop ends the pod's containers and its VM and gives its network back. The pod stays, as not
// ready, until Remove. Stopping a stopped pod succeeds.
func (p *Pod) Stop(ctx context.Context) error {
	ctx, cancel := operation(ctx, opLimit)
	defer cancel()
	if err := p.change.lock(ctx); err != nil {
		return err
	}
	defer p.change.unlock()
	defer p.m.pool.use()()
	if err := p.stop(ctx); err != nil {
		return fmt.Errorf("stop pod %s: %w", p.id, err)
	}
	return nil
}

// stop needs the pod's change lock.
func (p *Pod) stop(ctx context.Context) error {
	if p.record.now().Down {
		return nil
	}
	p.quiesce(ctx)
	ended := false
	var group errgroup.Group // what fails does not stop a plugin in the middle
	group.Go(func() error {
		if err := p.killMachine(ctx); err != nil {
			return err
		}
		ended = true
		return p.release(ctx)
	})
	group.Go(func() error {
		return p.m.o.Network.Teardown(ctx, networkPod(p.id, p.record.now().Config))
	})
	err := group.Wait()
	if !ended {
		return err
	}
	p.endContainers(stopReason, "")
	if err == nil {
		err = errors.Join(removeCgroup(p.record.now().VM.Cgroup), os.RemoveAll(p.m.layout.run(p.id)))
	}
	was := p.record.now().Stage
	p.note("record that the pod stopped", p.record.set(func(r *podRecord) {
		if r.Stage != stopped {
			r.Reason = stopReason
		}
		r.Stage, r.Down = stopped, err == nil
	}))
	if was != stopped {
		slog.Info("pod stopped", "pod", p.id)
		p.m.events.send(Event{Kind: EventStopped, Pod: p.Status()})
	}
	return err
}

// stopReason is that of pods, and containers in them, which were stopped because somebody asked.
const stopReason = "Stopped"

// note logs that a change was not recorded. It has happened all the same, and a daemon that starts
// anew finds it out from the VM.
func (p *Pod) note(what string, err error) {
	if err != nil {
		slog.Error(what, "pod", p.id, "err", err)
	}
}

// quiesceLimit bounds how long a stop waits for containers that should have ended before it.
const quiesceLimit = 5 * time.Second

// quiesce kills the containers that still run, and waits until what they said is in their logs: with
// the VM it would be lost.
func (p *Pod) quiesce(ctx context.Context) {
	if !p.running() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, quiesceLimit)
	defer cancel()
	var group sync.WaitGroup
	for _, c := range p.Containers() {
		group.Go(func() {
			if err := c.stop(ctx, 0); err != nil {
				slog.Warn("kill a container of a pod that stops", "pod", p.id, "container", c.id, "err", err)
				return
			}
			c.drain(ctx)
		})
	}
	group.Wait()
}

// killMachine ends the VM on purpose.
func (p *Pod) killMachine(ctx context.Context) error {
	p.mu.Lock()
	p.leaving = true
	p.mu.Unlock()
	p.letGo()
	if err := p.endVM(ctx); err != nil {
		return fmt.Errorf("kill its VM: %w", err)
	}
	p.setMachine(nil)
	return nil
}

// endVM ends the VM, also one that only a former daemon knew. It is idempotent.
func (p *Pod) endVM(ctx context.Context) error {
	if v := p.machine(); v != nil {
		return v.Kill(ctx)
	}
	return process.KillIn(ctx, p.m.layout.run(p.id)) // its VMM may live and answer nobody
}

// letGo ends what follows the VM, and waits for nothing.
func (p *Pod) letGo() {
	p.tasks.stop()
	p.client.Close() // an error is that of a stream which is of no use any more
	p.m.syncer.forget(p)
}

// Remove stops the pod if need be and removes it with its containers and disks.
func (p *Pod) Remove(ctx context.Context) error {
	ctx, cancel := operation(ctx, opLimit)
	defer cancel()
	if err := p.change.lock(ctx); err != nil {
		return err
	}
	defer p.change.unlock()
	defer p.m.pool.use()()
	if err := p.stop(ctx); err != nil {
		return fmt.Errorf("remove pod %s: %w", p.id, err)
	}
	for _, c := range p.Containers() {
		c.forget()
	}
	if err := errors.Join(p.record.remove(), os.RemoveAll(p.m.layout.pod(p.id))); err != nil {
		return fmt.Errorf("remove pod %s: %w", p.id, err)
	}
	p.m.forget(p)
	slog.Info("pod removed", "pod", p.id)
	p.m.events.send(Event{Kind: EventDeleted, Pod: p.Status()})
	return nil
}

// Update resizes the VM for new resources of the pod as a whole. What can't be met is refused:
// errdefs.ErrOutOfRange, errdefs.ErrResourceExhausted.
func (p *Pod) Update(ctx context.Context, overhead, resources *Resources) error {
	ctx, cancel := operation(ctx, opLimit)
	defer cancel()
	if err := p.change.lock(ctx); err != nil {
		return err
	}
	defer p.change.unlock()
	if !p.running() {
		return p.notReady()
	}
	config := p.record.now().Config
	if overhead != nil {
		config.Overhead = overhead
	}
	if resources != nil {
		config.Resources = p.withoutRoom(*resources)
	}
	containers := p.limits("")
	err := p.allow(p.sizeFor(p.record.now().Config, containers), p.sizeFor(config, containers))
	if err == nil {
		err = p.fit(ctx, config, containers)
	}
	if err != nil {
		return fmt.Errorf("resize pod %s: %w", p.id, err)
	}
	p.note("record a pod's resources", p.record.set(func(r *podRecord) { r.Config = config }))
	return nil
}

// Stats asks the guest what the pod uses.
func (p *Pod) Stats(ctx context.Context) (PodStats, error) {
	rpc, err := p.rpc(ctx)
	if err != nil {
		return PodStats{}, err
	}
	p.makeRoom(p.record.now().Config) // the kubelet sets its limit anew as the last step of a resize
	r, err := rpc.Stats(ctx, &agent.StatsRequest{})
	if err != nil {
		return PodStats{}, fmt.Errorf("stats of pod %s: %w", p.id, err)
	}
	return podStats(r), nil
}

// printable cuts and cleans a text that came from the guest.
func printable(s string) string {
	const most = 1 << 10
	s = strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	return strings.ToValidUTF8(s[:min(len(s), most)], "")
}
