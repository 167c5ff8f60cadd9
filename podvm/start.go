package podvm

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/caisson-vm/caisson/network"
	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// birth is the start of a pod.
type birth struct {
	*Pod
	stopwatch
	// warm says that its VM runs already (see pool).
	warm bool
	// launched is closed when the VM takes devices.
	launched chan struct{}
	// connected is closed when the network, and the VM's cards for it, are there.
	connected chan struct{}

	// Each of these is set by one step and read by those that come after it.
	config  vmm.Config
	network *network.Attachment
	kernel  string
	agent   string // its version
	// addressed says that the guest has been told of its network when it was set up.
	addressed bool
}

func newBirth(p *Pod) *birth {
	return &birth{Pod: p, stopwatch: stopwatch{began: time.Now()}, launched: make(chan struct{}), connected: make(chan struct{}), config: p.record.now().VM}
}

// startPod makes a pod, while it is wanted: network and VM at the same time, then what needs both. What fails is
// undone.
func (m *Manager) startPod(ctx, wanted context.Context, b *birth, c PodConfig) error {
	defer b.closeTap()
	slog.Info("pod starts", "pod", b.id, "name", c.Namespace+"/"+c.Name)
	if err := b.run(ctx, wanted, c); err != nil {
		err = b.explain(err)
		b.time("undo", func() error { return b.abandon(err) }) // which has logged what it could not
		if m.o.Observer != nil {
			m.o.Observer.ObserveFailedStart(b.all(err))
		}
		return fmt.Errorf("start pod %s/%s: %w", c.Namespace, c.Name, err)
	}
	if m.o.Observer != nil {
		m.o.Observer.ObserveStart(b.origin(), b.all(nil))
	}
	slog.Info("pod ready", "pod", b.id, "name", c.Namespace+"/"+c.Name, "origin", b.origin(), "ms", time.Since(b.began).Milliseconds())
	return nil
}

// origin is what the pod's VM was when the start began or what it was made of: "warm", "clone", "boot".
func (b *birth) origin() string {
	switch {
	case b.warm:
		return "warm"
	case b.config.Template != "":
		return "clone"
	}
	return "boot"
}

func (b *birth) run(ctx, wanted context.Context, c PodConfig) error {
	if err := b.time("record", func() error { return b.begin(c) }); err != nil {
		return err
	}
	if !b.warm {
		if err := b.time("netns", b.open); err != nil {
			return err
		}
	}
	group, both := errgroup.WithContext(wanted)
	group.Go(func() error { return b.connect(ctx, both) })
	group.Go(func() error { return b.boot(both) })
	if err := group.Wait(); err != nil {
		return err
	}
	if !b.addressed {
		if err := b.time("addresses", func() error { return b.address(wanted) }); err != nil {
			return err
		}
	}
	return b.time("ready", b.becomeReady)
}

// endDelay is how long after its streams broke a VM's end may take to be seen.
const endDelay = 200 * time.Millisecond

// explain adds why the VM has ended to an error that came of that.
func (p *Pod) explain(err error) error {
	v := p.machine()
	if v == nil || !errdefs.IsUnavailable(err) || errors.Is(err, vmm.ErrGone) {
		return err
	}
	select {
	case <-v.Done():
		return fmt.Errorf("%w: %w: %w", err, vmm.ErrGone, v.Info().Err)
	case <-time.After(endDelay):
		return err
	}
}

// begin records what is about to happen, and makes the pod's folders and cgroup.
func (b *birth) begin(c PodConfig) error {
	if !b.warm {
		if err := b.makeFolders(); err != nil {
			return err
		}
	}
	cgroup, err := b.m.cgroups.path(c.CgroupParent, b.id)
	if err != nil {
		return err
	}
	b.config.Cgroup = cgroup
	if err := b.record.set(func(r *podRecord) {
		r.Config, r.Created, r.VM.Cgroup, r.NodeEmptyDirs = c, b.began, cgroup, b.m.o.NodeEmptyDirs
	}); err != nil {
		return err
	}
	if c.LogDir != "" {
		if err := os.MkdirAll(c.LogDir, 0o755); err != nil {
			return fmt.Errorf("log folder: %w", noSpace(err, c.LogDir))
		}
	}
	return makeCgroup(cgroup)
}

func (b *birth) makeFolders() error {
	l := b.m.layout
	for _, dir := range []string{l.pod(b.id), l.containers(b.id), l.run(b.id)} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return fmt.Errorf("pod folder: %w", noSpace(err, dir))
		}
	}
	return nil
}

// open makes the pod's network namespace with the tap that the VM starts with.
func (b *birth) open() (err error) {
	b.config.Tap, err = b.m.o.Network.Open(b.id)
	return err
}

// closeTap closes the tap, which was kept open in case that another VM is to have it.
func (b *birth) closeTap() {
	if b.config.Tap != nil {
		b.config.Tap.Close()
	}
}

// connect gives the pod its network, and the VM, while both lasts, the cards for it that it does not have yet.
// A plugin that is ended in the middle leaves the node what no other mends, so that a VM that fails, or a pod that
// is not wanted any more, ends none.
func (b *birth) connect(ctx, both context.Context) error {
	err := b.time("network", func() (err error) {
		b.network, err = b.m.o.Network.Setup(ctx, networkPod(b.id, b.record.now().Config))
		return err
	})
	if err != nil {
		return err
	}
	if len(b.network.Interfaces) > 1 {
		select {
		case <-b.launched:
		case <-both.Done():
			return context.Cause(both)
		}
		if err := b.time("nics", func() error { return b.addNICs(both) }); err != nil {
			return err
		}
	}
	close(b.connected)
	return nil
}

func networkPod(id string, c PodConfig) network.Pod {
	n := network.Pod{
		ID: id, Name: c.Name, Namespace: c.Namespace, UID: c.UID, Annotations: c.Annotations, DNS: network.DNS(c.DNS),
	}
	for _, m := range c.PortMappings {
		n.PortMappings = append(n.PortMappings, network.PortMapping(m))
	}
	return n
}

func (b *birth) addNICs(ctx context.Context) error {
	for i, nic := range b.network.Interfaces {
		if i == 0 {
			continue // the VM has it from the beginning
		}
		mac, err := net.ParseMAC(nic.MAC)
		if err != nil {
			return fmt.Errorf("%s: %w", nic.Name, err)
		}
		tap, err := b.m.o.Network.OpenTap(b.network, i)
		if err != nil {
			return err
		}
		err = b.machine().AddNIC(ctx, vmm.NIC{MAC: mac, Tap: tap, MTU: nic.MTU})
		tap.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// identify makes the guest this pod's: until then it is like every other.
func (b *birth) identify(ctx context.Context, rpc agent.AgentClient) error {
	c := b.record.now().Config
	dns, err := c.DNS.orNode()
	if err != nil {
		return err
	}
	entropy := make([]byte, 64)
	rand.Read(entropy)
	machine := sha256.Sum256([]byte("machine " + b.id))
	request := &agent.SetupRequest{
		PodId: b.id, Hostname: hostname(b.id, c), Entropy: entropy,
		MachineId: hex.EncodeToString(machine[:16]), Dns: &agent.DNS{Servers: dns.Servers, Searches: dns.Searches, Options: dns.Options},
		ShmSize: c.ShmSize, ScratchAddr: scratchAddress(),
	}
	select {
	case <-b.connected:
		request.Network = b.addresses()
	default: // the plugins take longer: the guest need not wait for them
	}
	request.ClockNs = time.Now().UnixNano()
	r, err := rpc.Setup(ctx, request)
	if err != nil {
		return fmt.Errorf("set up the guest: %w", err)
	}
	b.kernel, b.agent, b.addressed = printable(r.Kernel), printable(r.Agent), request.Network != nil
	return nil
}

// hostname is the pod's, or one made of its id.
func hostname(id string, c PodConfig) string {
	if c.Hostname != "" {
		return c.Hostname
	}
	return id[:12]
}

// addresses are what the guest is to know of its network.
func (b *birth) addresses() *agent.NetworkRequest {
	request := &agent.NetworkRequest{Sysctls: map[string]string{}}
	maps.Copy(request.Sysctls, b.network.Sysctls)
	maps.Copy(request.Sysctls, b.record.now().Config.Sysctls) // a pod's own count
	for n, i := range b.network.Interfaces {
		nic := &agent.Interface{Name: i.Name, Mac: i.MAC, Mtu: uint32(i.MTU), Addresses: i.Addresses}
		if n == 0 {
			nic.CardMac = vmm.CardMAC
		}
		for _, r := range i.Routes {
			nic.Routes = append(nic.Routes, &agent.Route{
				Destination: r.Destination, Gateway: r.Gateway, Source: r.Source, Metric: uint32(r.Metric), Scope: uint32(r.Scope),
				Mtu: uint32(r.MTU), Advmss: uint32(r.AdvMSS), Type: uint32(r.Type),
			})
		}
		for _, n := range i.Neighbours {
			nic.Neighbours = append(nic.Neighbours, &agent.Neighbour{Address: n.Address, Mac: n.MAC})
		}
		request.Interfaces = append(request.Interfaces, nic)
	}
	return request
}

// address has the guest configure its network cards.
func (b *birth) address(ctx context.Context) error {
	rpc, err := b.client.RPC(ctx)
	if err != nil {
		return err
	}
	if _, err := rpc.Network(ctx, b.addresses()); err != nil {
		return fmt.Errorf("configure the guest's network and sysctls: %w", err)
	}
	return nil
}

// becomeReady records the pod and makes it visible.
func (b *birth) becomeReady() error {
	phases := b.all(nil)
	err := b.record.set(func(r *podRecord) {
		r.Stage, r.VM, r.Network, r.Phases = ready, b.config, b.network, phases
		r.Kernel, r.Guest, r.Agent = b.kernel, b.m.o.Guest.Version, b.agent
	})
	if err != nil {
		return err
	}
	b.follow(func([]string) {}) // it has no containers yet
	b.m.add(b.Pod)
	b.m.events.send(Event{Kind: EventCreated, Pod: b.Status()})
	b.m.events.send(Event{Kind: EventStarted, Pod: b.Status()})
	return nil
}

// eraseLimit bounds the undoing of a start.
const eraseLimit = time.Minute

// abandon takes back a start that failed. What can't be taken back now stays as a pod that is not
// ready, for the kubelet to remove.
func (p *Pod) abandon(cause error) error {
	ctx, cancel := context.WithTimeout(context.Background(), eraseLimit)
	defer cancel()
	err := p.erase(ctx)
	if err != nil {
		p.unfinished(errors.Join(cause, err))
		p.m.add(p)
	}
	return err
}

// unfinished makes a pod of which something is left one that is not ready.
func (p *Pod) unfinished(err error) {
	slog.Error("undo the start of a pod", "pod", p.id, "err", err)
	p.note("record that a pod did not start", p.record.set(func(r *podRecord) {
		r.Stage, r.Reason, r.Message = stopped, "StartFailed", printable(err.Error())
		if r.Config.Name == "" { // it was nobody's yet
			r.Config = PodConfig{Name: "unfinished", Namespace: "unfinished", UID: p.id}
		}
	}))
}

// erase takes back all that belongs to the pod, from its id alone. It is idempotent.
func (p *Pod) erase(ctx context.Context) error {
	err := p.killMachine(ctx)
	if err == nil {
		err = p.release(ctx)
	}
	r := p.record.now()
	err = errors.Join(err, p.m.o.Network.Teardown(ctx, networkPod(p.id, r.Config)), removeCgroup(r.VM.Cgroup))
	if err != nil {
		return err // the record stays, so that it can be tried again
	}
	return errors.Join(os.RemoveAll(p.m.layout.run(p.id)), p.record.remove(), os.RemoveAll(p.m.layout.pod(p.id)))
}

// vmConfig is the VM of a pod before it is cloned.
func (m *Manager) vmConfig(id string) vmm.Config {
	g, disk := m.o.Guest, ScratchDisk()
	disk.Path = m.layout.scratch(id)
	return vmm.Config{
		ID: id, Dir: m.layout.run(id), Kernel: g.Kernel, Initrd: g.Initrd, Cmdline: g.Cmdline,
		Size: m.o.Size, Max: m.o.Max, Disk: disk,
	}
}
