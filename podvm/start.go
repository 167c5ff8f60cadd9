package podvm

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/caisson-vm/caisson/internal/undo"
	"github.com/caisson-vm/caisson/network"
	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// scratchSerial names the scratch disk in every VM.
const scratchSerial = "scratch"

// stopwatch notes the phases of a pod's start.
type stopwatch struct {
	began time.Time

	mu     sync.Mutex
	phases []Phase
}

// time runs a phase. Phases may run at the same time.
func (s *stopwatch) time(name string, do func() error) error {
	start := time.Since(s.began)
	err := do()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.phases = append(s.phases, Phase{name, start, time.Since(s.began) - start})
	return err
}

// startPod makes a pod: network and VM at the same time, then what needs both.
func (m *Manager) startPod(ctx context.Context, c PodConfig) (*Pod, error) {
	watch := &stopwatch{began: time.Now()}
	p := m.newPod(newID(), c)
	var u undo.Stack
	defer u.Run()
	u.Push("remove pod", p.erase)
	if err := watch.time("record", func() error { return p.prepare() }); err != nil {
		return nil, p.failed(err)
	}
	group, both := errgroup.WithContext(ctx)
	group.Go(func() error {
		return watch.time("network", func() error { return p.connect(both) })
	})
	group.Go(func() error { return p.boot(both, watch) })
	if err := group.Wait(); err != nil {
		return nil, p.failed(err)
	}
	if err := p.join(ctx, watch); err != nil {
		return nil, p.failed(err)
	}
	watch.phases = append(watch.phases, Phase{"total", 0, time.Since(watch.began)})
	if err := p.becomeReady(watch.phases); err != nil {
		return nil, p.failed(err)
	}
	u.Release()
	if m.o.Observer != nil {
		m.o.Observer.ObserveStart(watch.phases)
	}
	slog.Info("pod ready", "pod", p.id, "name", c.Namespace+"/"+c.Name, "ms", time.Since(watch.began).Milliseconds())
	return p, nil
}

func (p *Pod) failed(err error) error {
	c := p.record.Config
	return fmt.Errorf("start pod %s/%s: %w", c.Namespace, c.Name, err)
}

// prepare makes the pod's folders and records what is about to happen.
func (p *Pod) prepare() error {
	l := p.m.layout
	for _, dir := range []string{l.pod(p.id), l.containers(p.id), l.run(p.id)} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return fmt.Errorf("pod folder: %w", noSpace(err, dir))
		}
	}
	if dir := p.record.Config.LogDir; dir != "" {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("log folder: %w", noSpace(err, dir))
		}
	}
	cgroup, err := hostCgroup(p.record.Config.CgroupParent, p.id)
	if err != nil {
		return err
	}
	p.record.VM.Cgroup = cgroup
	return p.save()
}

// connect gives the pod its network.
func (p *Pod) connect(ctx context.Context) error {
	a, err := p.m.o.Network.Setup(ctx, p.network())
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	p.mu.Lock()
	p.record.Network = a
	p.mu.Unlock()
	return nil
}

func (p *Pod) network() network.Pod {
	c := p.record.Config
	n := network.Pod{
		ID: p.id, Name: c.Name, Namespace: c.Namespace, UID: c.UID, Annotations: c.Annotations, DNS: network.DNS(c.DNS),
	}
	for _, m := range c.PortMappings {
		n.PortMappings = append(n.PortMappings, network.PortMapping(m))
	}
	return n
}

// boot starts the VM, gives it its scratch disk and its identity.
func (p *Pod) boot(ctx context.Context, watch *stopwatch) error {
	scratch := make(chan error, 1)
	go func() {
		scratch <- watch.time("scratch", func() error { return p.m.scratch.create(p.m.layout.scratch(p.id)) })
	}()
	err := watch.time("vm", func() error { return p.launch(ctx) })
	if err := errors.Join(err, <-scratch); err != nil {
		return err
	}
	v := p.machine()
	var address string
	if err := watch.time("disk", func() (err error) {
		address, err = v.AddDisk(ctx, vmm.Disk{Serial: scratchSerial, Path: p.m.layout.scratch(p.id)})
		return err
	}); err != nil {
		return err
	}
	return watch.time("agent", func() error { return p.identify(ctx, address) })
}

// launch starts the VM as a clone, or cold where there is no template.
func (p *Pod) launch(ctx context.Context) error {
	v, err := p.m.launch(ctx, p.record.VM, p.record.Config.Namespace)
	if err != nil {
		return err
	}
	p.setMachine(v)
	return nil
}

// launch clones a template if it can. What went wrong with that is logged and counted, because cold
// starts are slow.
func (m *Manager) launch(ctx context.Context, c vmm.Config, namespace string) (vmm.VM, error) {
	if m.o.Templates == nil {
		return m.o.Driver.Launch(ctx, c)
	}
	scope := ""
	if m.o.Scope == "namespace" {
		scope = namespace
	}
	dir, err := m.o.Templates.Template(ctx, scope)
	if err == nil {
		clone := c
		clone.Template = dir
		var v vmm.VM
		if v, err = m.o.Driver.Launch(ctx, clone); err == nil {
			return v, nil
		}
		m.o.Templates.Failed(dir)
	}
	if ctx.Err() != nil {
		return nil, err
	}
	slog.Warn("pod is booted cold: no clone of a template", "pod", c.ID, "err", err)
	if m.o.Observer != nil {
		m.o.Observer.ObserveFallback()
	}
	return m.o.Driver.Launch(ctx, c)
}

// identify makes the guest this pod's: until then it is like every other.
func (p *Pod) identify(ctx context.Context, scratch string) error {
	rpc, err := p.client.RPC(ctx)
	if err != nil {
		return err
	}
	c := p.record.Config
	entropy := make([]byte, 64)
	rand.Read(entropy)
	machine := sha256.Sum256([]byte("machine " + p.id))
	dns, err := c.DNS.orNode()
	if err != nil {
		return err
	}
	hostname := c.Hostname
	if hostname == "" {
		hostname = p.id[:12]
	}
	r, err := rpc.Setup(ctx, &agent.SetupRequest{
		PodId: p.id, Hostname: hostname, ClockNs: time.Now().UnixNano(), Entropy: entropy,
		MachineId: hex.EncodeToString(machine[:16]), Dns: &agent.DNS{Servers: dns.Servers, Searches: dns.Searches, Options: dns.Options},
		Sysctls: c.Sysctls, ShmSize: c.ShmSize, ScratchAddr: scratch,
	})
	if err != nil {
		return fmt.Errorf("set up the guest: %w", err)
	}
	p.record.Kernel = printable(r.Kernel)
	return nil
}

// join brings the VM and its network together and gives it its size.
func (p *Pod) join(ctx context.Context, watch *stopwatch) error {
	if err := watch.time("nics", func() error { return p.addNICs(ctx) }); err != nil {
		return err
	}
	if err := watch.time("addresses", func() error { return p.address(ctx) }); err != nil {
		return err
	}
	return watch.time("size", func() error { return p.fit(ctx) })
}

func (p *Pod) addNICs(ctx context.Context) error {
	for i, nic := range p.record.Network.Interfaces {
		mac, err := net.ParseMAC(nic.MAC)
		if err != nil {
			return fmt.Errorf("network interface %s: %w", nic.Name, err)
		}
		tap, err := p.m.o.Network.OpenTap(p.record.Network, i)
		if err != nil {
			return err
		}
		err = p.machine().AddNIC(ctx, vmm.NIC{MAC: mac, Tap: tap, MTU: nic.MTU})
		tap.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// address has the guest configure its network cards.
func (p *Pod) address(ctx context.Context) error {
	request := &agent.NetworkRequest{}
	for _, i := range p.record.Network.Interfaces {
		nic := &agent.Interface{Name: i.Name, Mac: i.MAC, Mtu: uint32(i.MTU), Addresses: i.Addresses}
		for _, r := range i.Routes {
			nic.Routes = append(nic.Routes, &agent.Route{
				Destination: r.Destination, Gateway: r.Gateway, Source: r.Source, Metric: uint32(r.Metric), Scope: uint32(r.Scope),
			})
		}
		for _, n := range i.Neighbours {
			nic.Neighbours = append(nic.Neighbours, &agent.Neighbour{Address: n.Address, Mac: n.MAC})
		}
		request.Interfaces = append(request.Interfaces, nic)
	}
	rpc, err := p.client.RPC(ctx)
	if err != nil {
		return err
	}
	if _, err := rpc.Network(ctx, request); err != nil {
		return fmt.Errorf("configure the guest's network: %w", err)
	}
	return nil
}

// becomeReady records the pod and makes it visible.
func (p *Pod) becomeReady(phases []Phase) error {
	p.mu.Lock()
	p.record.Stage, p.record.Phases = ready, phases
	err := p.saveLocked()
	p.mu.Unlock()
	if err != nil {
		return err
	}
	p.m.add(p)
	p.follow()
	p.m.events.send(Event{Kind: EventCreated, Pod: p.Status()})
	p.m.events.send(Event{Kind: EventStarted, Pod: p.Status()})
	return nil
}

// erase takes back all that belongs to the pod, from its id alone. It is idempotent.
func (p *Pod) erase(ctx context.Context) error {
	err := p.killMachine(ctx)
	err = errors.Join(err, p.m.o.Network.Teardown(ctx, p.network()), removeCgroup(p.record.VM.Cgroup))
	if err != nil {
		return err // the record stays, so that it can be tried again
	}
	return errors.Join(os.RemoveAll(p.m.layout.run(p.id)), os.RemoveAll(p.m.layout.pod(p.id)))
}

// vmConfig is the VM of a pod before it is cloned.
func (m *Manager) vmConfig(id string) vmm.Config {
	g := m.o.Guest
	return vmm.Config{
		ID: id, Dir: filepath.Clean(m.layout.run(id)), Kernel: g.Kernel, Initrd: g.Initrd, Cmdline: g.Cmdline,
		Size: m.o.Size, Max: m.o.Max,
	}
}
