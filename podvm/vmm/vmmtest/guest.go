package vmmtest

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// guest is the inside of a VM under test: its agent and, once enter was called, a probe in a
// container.
type guest struct {
	vm    vmm.VM
	agent *agent.Client
	port  uint16 // how many probes there were
	*rpc.Client
}

func newGuest(v vmm.VM) *guest { return &guest{vm: v, agent: agent.NewClient(v)} }

func (g *guest) close() error {
	if g.Client != nil {
		g.Client.Close()
	}
	return g.agent.Close()
}

// setup gives the guest its identity, with entropy of its own as a pod's has, and returns its boot id.
func (g *guest) setup(ctx context.Context, id string) (bootID string, err error) {
	rpc, err := g.agent.RPC(ctx)
	if err != nil {
		return "", err
	}
	entropy := make([]byte, 64)
	rand.Read(entropy)
	r, err := rpc.Setup(ctx, &agent.SetupRequest{PodId: id, Hostname: id, ClockNs: time.Now().UnixNano(), Entropy: entropy, MachineId: strings.Repeat("b", 32)})
	if err != nil {
		return "", err
	}
	return r.BootId, nil
}

// imageSerial names the disk with the probe.
const imageSerial = "image"

// addImage plugs the disk with the probe in.
func addImage(ctx context.Context, v vmm.VM, image string) (addr string, err error) {
	return v.AddDisk(ctx, vmm.Disk{Serial: imageSerial, Path: image, ReadOnly: true, Shared: true})
}

// enter runs the probe of the disk at image in a container, with device as container takes it, and
// connects to it.
func (g *guest) enter(ctx context.Context, image string, device *agent.BlockDevice) error {
	client, err := g.container(ctx, "probe", image, device)
	g.Client = client
	return err
}

// container runs a probe in a container of that name, with device, where set, at devicePath.
func (g *guest) container(ctx context.Context, id, image string, device *agent.BlockDevice) (*rpc.Client, error) {
	service, err := g.agent.RPC(ctx)
	if err != nil {
		return nil, err
	}
	// A port of its own: containers share the network of their pod.
	g.port++
	number := firstPort + g.port
	spec, err := json.Marshal(specs.Spec{Process: &specs.Process{Args: []string{probePath, probeArg, strconv.Itoa(int(number))}, Cwd: "/"}})
	if err != nil {
		return nil, err
	}
	request := &agent.CreateRequest{Id: id, Spec: spec, Rootfs: &agent.Rootfs{ImageAddr: image, Dax: true}}
	if device != nil {
		request.Mounts = []*agent.Mount{{Destination: devicePath, Source: &agent.Mount_Device{Device: device}}}
	}
	if _, err := service.Create(ctx, request); err != nil {
		return nil, err
	}
	if _, err := service.Start(ctx, &agent.StartRequest{Id: id}); err != nil {
		return nil, err
	}
	if err := g.awaitProbe(ctx, id); err != nil {
		return nil, err
	}
	conn, err := g.agent.PortForward(ctx, number)
	if err != nil {
		return nil, err
	}
	return rpc.NewClient(conn), nil
}

const (
	devicePath = "/dev/device"
	firstPort  = 7000
)

// reached configures a card, and connects to the first probe over it and the wire.
func (g *guest) reached(ctx context.Context, w *wire, card *agent.Interface) error {
	service, err := g.agent.RPC(ctx)
	if err != nil {
		return err
	}
	card.Addresses = []string{wireGuest + wirePrefix}
	if _, err := service.Network(ctx, &agent.NetworkRequest{Interfaces: []*agent.Interface{card}}); err != nil {
		return err
	}
	conn, err := w.dial(ctx, net.JoinHostPort(wireGuest, strconv.Itoa(firstPort+1)))
	if err != nil {
		return fmt.Errorf("no frames pass: %w", err)
	}
	return conn.Close()
}

// awaitProbe reads the container's output up to the probe's word.
func (g *guest) awaitProbe(ctx context.Context, id string) error {
	out, err := g.agent.Output(ctx, id, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	var said []string
	for {
		record, err := out.Next()
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("the probe ended: %q", said)
		}
		if err != nil {
			return err
		}
		if string(record.Line) == probeReady {
			return nil
		}
		said = append(said, string(record.Line))
	}
}

// remove ends a container.
func (g *guest) remove(ctx context.Context, id string) error {
	service, err := g.agent.RPC(ctx)
	if err != nil {
		return err
	}
	_, err = service.Remove(ctx, &agent.RemoveRequest{Id: id})
	return err
}

// text reads a small file of the guest, without the space around it.
func (g *guest) text(ctx context.Context, path string) (string, error) {
	var data []byte
	err := call(ctx, g.Client, "Read", Span{Path: path, Size: 1 << 20}, &data)
	return strings.TrimSpace(string(data)), err
}

// cpus counts the online ones.
func (g *guest) cpus(ctx context.Context) (n int, err error) {
	text, err := g.text(ctx, "/sys/devices/system/cpu/online")
	if err != nil {
		return 0, err
	}
	for part := range strings.SplitSeq(text, ",") {
		first, last, ok := strings.Cut(part, "-")
		if !ok {
			last = first
		}
		from, err1 := strconv.Atoi(first)
		to, err2 := strconv.Atoi(last)
		if err := errors.Join(err1, err2); err != nil {
			return 0, fmt.Errorf("online CPUs %q: %w", text, err)
		}
		n += to - from + 1
	}
	return n, nil
}

// memory is the guest's MemTotal, in bytes.
func (g *guest) memory(ctx context.Context) (int64, error) {
	text, err := g.text(ctx, "/proc/meminfo")
	if err != nil {
		return 0, err
	}
	var kib int64
	if _, err := fmt.Sscanf(text, "MemTotal: %d kB", &kib); err != nil {
		return 0, fmt.Errorf("meminfo %.40q: %w", text, err)
	}
	return kib << 10, nil
}

// files reads all small files of a pattern, by path.
func (g *guest) files(ctx context.Context, pattern string) (map[string]string, error) {
	var paths []string
	if err := call(ctx, g.Client, "Glob", pattern, &paths); err != nil {
		return nil, err
	}
	all := map[string]string{}
	for _, path := range paths {
		text, err := g.text(ctx, path)
		if err != nil {
			continue // it went meanwhile
		}
		all[path] = text
	}
	return all, nil
}
