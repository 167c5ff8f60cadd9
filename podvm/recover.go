package podvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/state"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// After a restart this many pods are attached to at once, each within the limit.
const (
	attachAtOnce = 32
	attachLimit  = 20 * time.Second
)

// Recover finds what former daemons left: it attaches to VMs that run, learns what happened
// meanwhile, takes back what was half-made, and removes what belongs to no pod. Records that it
// can't read stay, as pods that are not ready and containers of which the state is not known. It is
// called once, before the CRI is served. Where it fails, because ctx has ended or the node lacks
// something, VMs run on, for the next daemon.
func (m *Manager) Recover(ctx context.Context) error {
	entries, err := os.ReadDir(m.layout.pods())
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	var group errgroup.Group
	group.SetLimit(attachAtOnce)
	for _, e := range entries {
		group.Go(func() error {
			if err := m.recoverPod(ctx, e.Name()); err != nil {
				return fmt.Errorf("recover pod %s: %w", e.Name(), err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	return m.sweep(ctx)
}

// recoverPod brings back one pod. A pod that can't be is shown as not ready, with the reason. An error is not
// the pod's: it is as it was.
func (m *Manager) recoverPod(ctx context.Context, id string) error {
	if !isID(id) {
		slog.Warn("not a pod's folder, left alone", "path", m.layout.pod(id))
		return nil
	}
	var r podRecord
	err := state.Read(m.layout.record(id), &r)
	if errors.Is(err, fs.ErrNotExist) || err == nil && r.Stage == starting && r.ID == id {
		return m.undoPod(ctx, id, r)
	}
	if err == nil && r.ID != id {
		err = fmt.Errorf("record of %s in the folder of %s", r.ID, id)
	}
	if isNodes(err) {
		return err
	}
	if err != nil {
		return m.unreadable(ctx, id, err)
	}
	p := m.podOf(r)
	if err := m.recoverContainers(p); err != nil {
		return err
	}
	m.register(p)
	switch {
	case r.Down:
		p.endContainers(r.Reason, r.Message)
	case r.Stage != ready: // whoever let it fall may have died before its VM did
		p.bury()
	default:
		limited, cancel := context.WithTimeout(ctx, m.attach)
		defer cancel()
		err := p.reattach(limited)
		if err != nil && !errors.Is(err, vmm.ErrGone) && (isNodes(err) || ctx.Err() != nil) {
			return err
		}
		if err != nil {
			p.lost(err)
		}
	}
	return nil
}

// isNodes tells whether an error is of what the whole node lacks: that no pod comes back for it says nothing
// of the pods.
func isNodes(err error) bool {
	for _, errno := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOSPC, unix.EDQUOT} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// undoPod takes back a pod that a daemon died over. What can't be taken back now stays as a pod that is not
// ready, for the kubelet to remove.
func (m *Manager) undoPod(ctx context.Context, id string, r podRecord) error {
	if r.ID == "" {
		r = podRecord{ID: id, Driver: m.o.Driver.Name(), VM: m.vmConfig(id)}
	}
	p := m.podOf(r)
	limited, cancel := context.WithTimeout(ctx, eraseLimit)
	defer cancel()
	err := p.erase(limited)
	switch {
	case err == nil:
		slog.Info("half-made pod taken back", "pod", id)
	case ctx.Err() != nil:
		return err
	default:
		p.unfinished(errors.Join(errors.New("a daemon ended while the pod started"), err))
		m.register(p)
	}
	return nil
}

func (m *Manager) recoverContainers(p *Pod) error {
	files, err := filepath.Glob(filepath.Join(m.layout.containers(p.id), "*.json"))
	if err != nil {
		return err
	}
	for _, path := range files {
		var r containerRecord
		err := state.Read(path, &r)
		if isNodes(err) {
			return err
		}
		if err == nil && (r.ID != strings.TrimSuffix(filepath.Base(path), ".json") || r.Pod != p.id) {
			err = fmt.Errorf("%s is the record of another container", path)
		}
		if err != nil {
			p.addUnreadable(path, err)
			continue
		}
		p.add(p.containerOf(r))
	}
	return nil
}

// reattach finds the pod's VM and goes on with its containers. It returns when the agent has told
// what happened meanwhile, and that was recorded; an agent that says nothing is waited for no longer than ctx.
func (p *Pod) reattach(ctx context.Context) error {
	r := p.record.now()
	driver := p.m.o.Drivers[r.Driver]
	if driver == nil {
		return fmt.Errorf("its driver %s is not available", r.Driver)
	}
	v, err := driver.Attach(ctx, r.VM)
	if err != nil {
		return err
	}
	p.setMachine(v)
	p.rank() // the daemon before may not have come to it
	for _, c := range p.Containers() {
		c.followOutput() // also of those that have ended: what they said last may be missing
	}
	listed := make(chan []string, 1)
	p.follow(func(unknown []string) {
		select {
		case listed <- unknown:
		default:
		}
	})
	select {
	case unknown := <-listed:
		p.found(ctx, unknown)
	case <-v.Done(): // machineEnded tells it
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) {
			return ctx.Err()
		}
		// Whether it hangs is for vm.watchdog to say.
		slog.Warn("the guest of a pod does not answer the new daemon yet", "pod", p.id, "waited", p.m.attach)
		p.tasks.start(func(ctx context.Context) {
			select {
			case unknown := <-listed:
				p.foundLate(ctx, unknown)
			case <-ctx.Done():
			}
		})
	}
	return nil
}

// foundLate is found, when the kubelet may be making containers: one that is being made has no record yet.
func (p *Pod) foundLate(ctx context.Context, unknown []string) {
	limited, cancel := context.WithTimeout(ctx, p.m.attach)
	defer cancel()
	if err := p.change.lock(limited); err != nil { // what is half-made then is left to the next daemon
		unknown = nil
	} else {
		defer p.change.unlock()
	}
	p.found(limited, unknown)
}

// found goes on with a pod whose agent has told of its containers.
func (p *Pod) found(ctx context.Context, unknown []string) {
	p.removeUnknown(ctx, unknown)
	p.awaitExits(ctx)
	if err := p.endUnnamed(ctx); err != nil { // it is tried again before the pod's next container is made
		slog.Error("containers with unreadable records", "pod", p.id, "err", err)
	}
	p.resumeVolumes()
	slog.Info("pod found again", "pod", p.id)
}

// removeUnknown removes containers that the guest has and no record names: they were half-made.
func (p *Pod) removeUnknown(ctx context.Context, ids []string) {
	for _, id := range ids {
		if ctx.Err() != nil {
			return // the guest is too slow, or says too much; the next daemon asks again
		}
		if !isID(id) {
			continue
		}
		if _, err := os.Lstat(p.m.layout.container(p.id, id)); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		rpc, err := p.rpc(ctx)
		if err == nil {
			_, err = rpc.Remove(ctx, &agent.RemoveRequest{Id: id})
		}
		if err != nil {
			slog.Error("remove a half-made container", "pod", p.id, "container", id, "err", err)
			continue
		}
		slog.Info("half-made container removed", "pod", p.id, "container", id)
	}
}

// awaitExits waits until the exits that the agent reported are recorded, so that the first answer of
// the daemon is true.
func (p *Pod) awaitExits(ctx context.Context) {
	for _, c := range p.Containers() {
		if !c.exiting.Load() {
			continue
		}
		select {
		case <-c.exited:
		case <-ctx.Done():
			return
		}
	}
}

// resumeVolumes goes on serving directories, and keeping copies in step.
func (p *Pod) resumeVolumes() {
	if dirs := p.record.now().Shares; len(dirs) > 0 {
		p.m.o.Shares.Resume(p.sharing(), dirs)
	}
	for _, c := range p.Containers() {
		for _, path := range c.record.now().Volumes {
			if err := p.m.syncer.keep(p, path); err != nil {
				slog.Warn("keep a volume in step", "pod", p.id, "err", err)
				continue
			}
			p.m.syncer.changed(path) // it may have changed meanwhile
		}
	}
}

// lost handles a VM that is gone, or can't be reached.
func (p *Pod) lost(err error) {
	reason := "Unreachable"
	if errors.Is(err, vmm.ErrGone) {
		reason = "VMGone"
	}
	p.collapse(reason, printable(err.Error()))
}

// sweep removes what belongs to no pod.
func (m *Manager) sweep(ctx context.Context) error {
	entries, err := os.ReadDir(m.layout.pods())
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	var ids []string // also of those that could not be taken back yet
	short := map[string]bool{}
	for _, e := range entries {
		if id := e.Name(); len(id) == 64 {
			ids = append(ids, id)
			short[id[:shortID]] = true
		}
	}
	if err := m.o.Network.GC(ctx, ids); err != nil {
		slog.Warn("network: collect garbage", "err", err)
	}
	entries, err = os.ReadDir(m.layout.state)
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	var group sync.WaitGroup
	for _, e := range entries {
		if name := e.Name(); e.IsDir() && len(name) == shortID && isHex(name) && !short[name] {
			group.Go(func() { m.sweepRun(ctx, filepath.Join(m.layout.state, name)) })
		}
	}
	group.Wait()
	return nil
}

// sweepRun removes a runtime folder without a pod, and the VM in it.
func (m *Manager) sweepRun(ctx context.Context, dir string) {
	ctx, cancel := context.WithTimeout(ctx, attachLimit)
	defer cancel()
	if err := errors.Join(process.KillIn(ctx, dir), m.o.Shares.Release(ctx, dir)); err != nil {
		slog.Error("end a VM without a pod", "dir", dir, "err", err)
		return
	}
	if err := os.RemoveAll(dir); err != nil {
		slog.Error("remove what belongs to no pod", "dir", dir, "err", err)
	}
}
