package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// rehearsal is the id of the container that Rehearse makes.
const rehearsal = "rehearsal"

// rehearse takes the network card, and a container of the guest's own root with a further process in
// it, through their lives, after the guest was a pod's for a moment. A container with an image gets no further than
// a pod's do when they are started.
func (a *Agent) rehearse(ctx context.Context, req *agent.RehearseRequest) (err error) {
	a.mu.Lock()
	ready := a.prepared && a.setup == nil
	a.mu.Unlock()
	if !ready {
		return fmt.Errorf("the guest has been set up, or is not prepared: %w", errdefs.ErrFailedPrecondition)
	}
	if err := a.rehearseSetup(ctx); err != nil {
		return err
	}
	if err := a.cards.rehearse(ctx); err != nil {
		return err
	}
	if req.Rootfs != nil {
		return a.rehearseStart(ctx, req)
	}
	spec, err := decodeSpec(req.Spec)
	if err != nil {
		return err
	}
	process := specs.Process{Args: []string{a.o.Crun, "--version"}, Cwd: "/"}
	spec.Process.Args = process.Args
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	c, err := a.reserve(rehearsal)
	if err != nil {
		return err
	}
	root := func(*container) (string, error) { return "/", nil }
	if _, err := c.create(ctx, &agent.CreateRequest{Id: rehearsal, Spec: data}, root); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, c.remove(context.WithoutCancel(ctx)), a.settle(c))
	}()
	if err := c.rehearseExec(ctx, process); err != nil {
		return err
	}
	if _, err := c.start(ctx); err != nil {
		return err
	}
	return await(ctx, c.exited)
}

// rehearseStart starts a container, which stays.
func (a *Agent) rehearseStart(ctx context.Context, req *agent.RehearseRequest) error {
	c, _, err := a.createOfImage(ctx, &agent.CreateRequest{Id: rehearsal, Spec: req.Spec, Rootfs: req.Rootfs})
	if err != nil {
		return err
	}
	_, err = c.start(ctx)
	return err
}

// rehearseSetup reads requests of the kinds that come for every pod, and makes this guest a pod's and then
// nobody's again.
func (a *Agent) rehearseSetup(ctx context.Context) error {
	setup := &agent.SetupRequest{
		PodId: rehearsal, Hostname: rehearsal, MachineId: rehearsal,
		Dns: &agent.DNS{Servers: []string{"192.0.2.1"}, Searches: []string{rehearsal}, Options: []string{"ndots:5"}},
	}
	network := &agent.NetworkRequest{Interfaces: []*agent.Interface{{
		Name: cardName, Addresses: []string{"192.0.2.2/24"},
		Routes: []*agent.Route{{Destination: "0.0.0.0/0"}}, Neighbours: []*agent.Neighbour{{Address: "192.0.2.1"}},
	}}}
	create := &agent.CreateRequest{Id: rehearsal, Rootfs: &agent.Rootfs{ImageAddr: rehearsal}, Mounts: []*agent.Mount{{}}, User: &agent.User{}}
	for _, m := range []proto.Message{
		setup, network, &agent.SetupResponse{Kernel: rehearsal}, create, &agent.CreateResponse{Groups: []int64{1}},
		&agent.StartRequest{Id: rehearsal}, &agent.StartResponse{Pid: 1},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			return err
		}
		if err := proto.Unmarshal(data, m.ProtoReflect().New().Interface()); err != nil {
			return err
		}
	}
	_, err := a.doSetup(ctx, setup)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.setup, a.podID = nil, ""
	return errors.Join(err, a.names.clear())
}

// rehearseExec runs a process in a container whose own has not started, and so can't have ended.
func (c *container) rehearseExec(ctx context.Context, process specs.Process) error {
	data, err := json.Marshal(process)
	if err != nil {
		return err
	}
	s, p, err := c.startExec(agent.Header{Process: data})
	if err != nil {
		return err
	}
	defer s.close()
	return await(ctx, p.ended)
}

// settle leaves nothing to be written or collected of what c was, so that a clone need not do it. A clone that
// rehearses once more collects nothing: it would copy most of the agent's memory for that.
func (a *Agent) settle(c *container) error {
	if err := os.RemoveAll(c.layer + goneSuffix); err != nil {
		return err
	}
	scratch, _ := a.storage()
	dir, err := os.Open(scratch)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return err
	}
	a.collected.Do(collectLate)
	return nil
}

// garbageMax is how much more memory the agent of a clone may have before it collects garbage, in bytes: it is
// what Go lets a small program have.
const garbageMax = 2 << 20

// collectLate collects the garbage of the rehearsal, and has the next collection wait until there is some. Go
// collects every two minutes otherwise, for which a clone copies most of the agent's memory.
func collectLate() {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(int64(m.Sys-m.HeapReleased) + garbageMax)
	type sentinel struct{ _ *byte } // of a kind that is not allocated together with others
	runtime.AddCleanup(new(sentinel), func(struct{}) {
		debug.SetGCPercent(100)
		debug.SetMemoryLimit(math.MaxInt64)
	}, struct{}{})
}

// await waits for an event or the end of ctx.
func await[T any](ctx context.Context, event <-chan T) error {
	select {
	case <-event:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
