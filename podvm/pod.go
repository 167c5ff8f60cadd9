package podvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/state"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// Pod is a pod in its VM. Its methods may be called concurrently; those that change it wait for one
// another, those that read never wait.
type Pod struct {
	m      *Manager
	id     string
	client *agent.Client
	change semaphore          // held by whoever changes the pod
	end    context.CancelFunc // ends what follows the VM; set by follow

	mu         sync.Mutex
	record     podRecord
	vm         vmm.VM // nil when it has none (any more)
	containers map[string]*Container
	hooks      []func() // what to end when the VM is let go
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

func (s semaphore) unlock() { <-s }

func (m *Manager) newPod(id string, c PodConfig) *Pod {
	return m.podOf(podRecord{
		ID: id, Config: c, Created: time.Now(), Stage: starting, Driver: m.o.Driver.Name(), VM: m.vmConfig(id),
		Disks: map[string]string{},
	})
}

func (m *Manager) podOf(r podRecord) *Pod {
	p := &Pod{m: m, id: r.ID, change: make(semaphore, 1), record: r, containers: map[string]*Container{}}
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

// Status is a snapshot. It never waits.
func (p *Pod) Status() PodStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.record
	s := PodStatus{
		ID: p.id, Config: r.Config, State: NotReady, Created: r.Created, Reason: r.Reason, Message: r.Message,
		Driver: r.Driver, Kernel: r.Kernel, Cgroup: r.VM.Cgroup, Phases: r.Phases,
	}
	if r.Stage == ready {
		s.State = Ready
	}
	if r.Network != nil {
		s.IPs, s.NetNS = r.Network.IPs(), r.Network.NetNS
	}
	if p.vm != nil {
		s.VMM = p.vm.Info()
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

func (p *Pod) save() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.saveLocked()
}

// saveLocked is file I/O under the mutex: readers wait for one write of a few kilobytes, and the
// record on the disk is never older than what they saw.
func (p *Pod) saveLocked() error { return state.Write(p.m.layout.record(p.id), p.record) }

// notReady says why the pod can't do what needs its VM.
func (p *Pod) notReady() error {
	s := p.Status()
	reason := s.Reason
	if s.Message != "" {
		reason += ": " + s.Message
	}
	if reason == "" {
		reason = "it has no VM"
	}
	return fmt.Errorf("pod %s is not ready: %s: %w", p.id, reason, errdefs.ErrFailedPrecondition)
}

func (p *Pod) rpc(ctx context.Context) (agent.AgentClient, error) {
	p.mu.Lock()
	ok := p.record.Stage == ready && p.vm != nil
	p.mu.Unlock()
	if !ok {
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
	return p.stop(ctx, "Stopped", "")
}

// stop needs the pod's change lock.
func (p *Pod) stop(ctx context.Context, reason, message string) error {
	p.mu.Lock()
	was := p.record.Stage
	p.mu.Unlock()
	if err := p.killMachine(ctx); err != nil {
		return fmt.Errorf("stop pod %s: %w", p.id, err)
	}
	p.endContainers(reason, message)
	err := errors.Join(p.m.o.Network.Teardown(ctx, p.network()), removeCgroup(p.record.VM.Cgroup), os.RemoveAll(p.m.layout.run(p.id)))
	if err != nil {
		return fmt.Errorf("stop pod %s: %w", p.id, err)
	}
	p.mu.Lock()
	if p.record.Stage != stopped && p.record.Reason == "" {
		p.record.Reason, p.record.Message = reason, message
	}
	p.record.Stage = stopped
	err = p.saveLocked()
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("stop pod %s: %w", p.id, err)
	}
	if was != stopped {
		slog.Info("pod stopped", "pod", p.id)
		p.m.events.send(Event{Kind: EventStopped, Pod: p.Status()})
	}
	return nil
}

// killMachine ends the VM, also one that only a former daemon knew.
func (p *Pod) killMachine(ctx context.Context) error {
	p.mu.Lock()
	if p.record.Stage == ready {
		p.record.Stage = stopping
	}
	v := p.vm
	driver := p.m.o.Drivers[p.record.Driver]
	p.mu.Unlock()
	p.detach()
	if v == nil && driver != nil {
		found, err := driver.Attach(ctx, p.record.VM)
		if err != nil && !errors.Is(err, vmm.ErrGone) {
			return err
		}
		v = found
	}
	if v == nil {
		return nil
	}
	if err := v.Kill(ctx); err != nil {
		return err
	}
	p.setMachine(nil)
	return nil
}

// detach ends what follows the VM, and waits for nothing.
func (p *Pod) detach() {
	p.mu.Lock()
	end, hooks := p.end, p.hooks
	p.hooks = nil
	p.mu.Unlock()
	if end != nil {
		end()
	}
	for _, f := range hooks {
		f()
	}
	p.client.Close()
	p.m.syncer.forget(p.id)
}

// Remove stops the pod if need be and removes it with its containers and disks.
func (p *Pod) Remove(ctx context.Context) error {
	ctx, cancel := operation(ctx, opLimit)
	defer cancel()
	if err := p.change.lock(ctx); err != nil {
		return err
	}
	defer p.change.unlock()
	if err := p.stop(ctx, "Stopped", ""); err != nil {
		return err
	}
	for _, c := range p.Containers() {
		p.m.forgetContainer(c)
		p.m.events.send(Event{Kind: EventDeleted, Pod: p.Status(), Container: c.Status()})
	}
	if err := os.RemoveAll(p.m.layout.pod(p.id)); err != nil {
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
	if p.machine() == nil {
		return p.notReady()
	}
	p.mu.Lock()
	old := p.record.Config
	if overhead != nil {
		p.record.Config.Overhead = overhead
	}
	if resources != nil {
		p.record.Config.Resources = resources
	}
	p.mu.Unlock()
	err := p.fit(ctx)
	if err != nil {
		p.mu.Lock()
		p.record.Config = old
		p.mu.Unlock()
		return fmt.Errorf("resize pod %s: %w", p.id, err)
	}
	return p.save()
}

// Stats asks the guest what the pod uses.
func (p *Pod) Stats(ctx context.Context) (PodStats, error) {
	rpc, err := p.rpc(ctx)
	if err != nil {
		return PodStats{}, err
	}
	r, err := rpc.Stats(ctx, &agent.StatsRequest{})
	if err != nil {
		return PodStats{}, fmt.Errorf("stats of pod %s: %w", p.id, err)
	}
	return podStats(r), nil
}

// PortForward connects the stream to a TCP port on the pod's loopback, until both sides have ended.
// Errors: errdefs.ErrUnavailable when nobody listens there.
func (p *Pod) PortForward(ctx context.Context, port uint16, stream io.ReadWriteCloser) error {
	if p.machine() == nil {
		return p.notReady()
	}
	conn, err := p.client.PortForward(ctx, port)
	if err != nil {
		return fmt.Errorf("port %d of pod %s: %w", port, p.id, err)
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	return relay(conn, stream)
}

// relay copies both ways; the end of one direction is passed on, and the other goes on.
func relay(conn net.Conn, stream io.ReadWriteCloser) error {
	defer conn.Close()
	up := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, stream)
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			err = errors.Join(err, half.CloseWrite())
		}
		up <- err
	}()
	_, err := io.Copy(stream, conn)
	stream.Close() // all that the pod had to say was said: the client's next word would reach nobody
	<-up
	return err
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
	return s[:min(len(s), most)]
}

// onDetach has f called when the pod's VM is let go.
func (p *Pod) onDetach(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hooks = append(p.hooks, f)
}
