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

	"github.com/caisson-vm/caisson/podvm/state"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// After a restart this many pods are attached to at once, each within the limit.
const (
	attachAtOnce = 32
	attachLimit  = 20 * time.Second
)

// Recover finds what former daemons left: it attaches to VMs that run, learns what happened
// meanwhile, takes back what was half-made, and removes what belongs to no pod. Records that it
// can't read stay, as pods that are not ready. It is called once, before the CRI is served.
func (m *Manager) Recover(ctx context.Context) error {
	entries, err := os.ReadDir(m.layout.pods())
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	var group errgroup.Group
	group.SetLimit(attachAtOnce)
	for _, e := range entries {
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, attachLimit)
			defer cancel()
			m.recoverPod(ctx, e.Name())
			return nil
		})
	}
	group.Wait()
	return m.sweep(ctx)
}

// recoverPod brings back one pod. A pod that can't be is shown as not ready, with the reason.
func (m *Manager) recoverPod(ctx context.Context, id string) {
	if len(id) != 64 {
		slog.Warn("not a pod's folder, left alone", "path", m.layout.pod(id))
		return
	}
	var r podRecord
	err := state.Read(m.layout.record(id), &r)
	if errors.Is(err, fs.ErrNotExist) || err == nil && r.Stage == starting {
		m.undoPod(ctx, id, r)
		return
	}
	if err == nil && r.ID != id {
		err = fmt.Errorf("record of %s in the folder of %s", r.ID, id)
	}
	if err != nil {
		slog.Error("unreadable record is kept", "pod", id, "err", err)
		r = podRecord{ID: id, Config: PodConfig{Name: "unreadable", Namespace: "unreadable", UID: id}, Stage: stopped, Reason: "Unreadable", Message: err.Error(), VM: m.vmConfig(id), Driver: m.o.Driver.Name()}
	}
	p := m.podOf(r)
	if p.record.Disks == nil {
		p.record.Disks = map[string]string{}
	}
	m.register(p)
	if err := m.recoverContainers(p); err != nil {
		slog.Error("records of containers", "pod", id, "err", err)
	}
	if p.record.Stage != ready {
		p.endContainers("Unknown", "the container ended while no daemon ran")
		return
	}
	if err := p.reattach(ctx); err != nil {
		p.lost(err)
	}
}

// undoPod takes back a pod that a daemon died over.
func (m *Manager) undoPod(ctx context.Context, id string, r podRecord) {
	r.ID = id
	if r.Driver == "" {
		r.Driver, r.VM = m.o.Driver.Name(), m.vmConfig(id)
	}
	if err := m.podOf(r).erase(ctx); err != nil {
		slog.Error("take back a half-made pod", "pod", id, "err", err)
		return
	}
	slog.Info("half-made pod taken back", "pod", id)
}

// register makes a pod that was read visible, under its name.
func (m *Manager) register(p *Pod) {
	m.add(p)
	s := &start{done: make(chan struct{}), pod: p}
	close(s.done)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.names[nameOf(p.record.Config)] = s
}

func (m *Manager) recoverContainers(p *Pod) error {
	files, err := filepath.Glob(filepath.Join(m.layout.containers(p.id), "*.json"))
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range files {
		var r containerRecord
		if err := state.Read(path, &r); err != nil {
			errs = append(errs, err)
			continue
		}
		if r.ID != strings.TrimSuffix(filepath.Base(path), ".json") || r.Pod != p.id {
			errs = append(errs, fmt.Errorf("%s is the record of another container", path))
			continue
		}
		m.addContainer(p.containerOf(r))
	}
	return errors.Join(errs...)
}

// reattach finds the pod's VM and goes on with its containers.
func (p *Pod) reattach(ctx context.Context) error {
	driver := p.m.o.Drivers[p.record.Driver]
	if driver == nil {
		return fmt.Errorf("its driver %s is not available: %w", p.record.Driver, vmm.ErrGone)
	}
	v, err := driver.Attach(ctx, p.record.VM)
	if err != nil {
		return err
	}
	p.setMachine(v)
	listed := make(chan error, 1)
	watch, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		synced := false
		err := p.watchOnce(watch, func() { synced = true; cancel() })
		if synced {
			err = nil
		}
		listed <- err
	}()
	for _, c := range p.Containers() {
		p.resume(c)
	}
	if err := <-listed; err != nil {
		return fmt.Errorf("its agent does not answer: %w", err)
	}
	p.follow()
	for _, c := range p.Containers() {
		for _, path := range c.record.Volumes {
			if err := p.m.syncer.keep(p, path); err != nil {
				slog.Warn("keep a volume in step", "pod", p.id, "err", err)
				continue
			}
			p.m.syncer.changed(path) // it may have changed meanwhile
		}
	}
	slog.Info("pod found again", "pod", p.id)
	return nil
}

// resume goes on with a container's log. One that was only half-made is removed.
func (p *Pod) resume(c *Container) {
	switch c.Status().State {
	case Exited:
		return
	case Unknown:
		p.m.forgetContainer(c)
		if err := c.removeFiles(); err != nil {
			slog.Error("remove a half-made container", "container", c.id, "err", err)
		}
		return
	}
	if err := c.openLog(); err != nil {
		slog.Error("container log", "container", c.id, "err", err)
	}
}

// lost records that a pod's VM is gone, or can't be reached.
func (p *Pod) lost(err error) {
	slog.Error("pod was not found again", "pod", p.id, "err", err)
	p.mu.Lock()
	p.record.Stage, p.record.Reason, p.record.Message = stopped, "VMGone", printable(err.Error())
	saved := p.saveLocked()
	p.mu.Unlock()
	if saved != nil {
		slog.Error("record the end of a pod", "pod", p.id, "err", saved)
	}
	p.endContainers("VMGone", printable(err.Error()))
}

// sweep removes what belongs to no pod.
func (m *Manager) sweep(ctx context.Context) error {
	var ids []string
	short := map[string]bool{}
	for _, p := range m.Pods() {
		ids = append(ids, p.id)
		short[p.id[:shortID]] = true
	}
	if err := m.o.Network.GC(ctx, ids); err != nil {
		slog.Warn("network: collect garbage", "err", err)
	}
	entries, err := os.ReadDir(m.layout.state)
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	var group sync.WaitGroup
	for _, e := range entries {
		if !e.IsDir() || len(e.Name()) != shortID || short[e.Name()] {
			continue
		}
		group.Go(func() { m.sweepRun(ctx, filepath.Join(m.layout.state, e.Name())) })
	}
	group.Wait()
	return nil
}

// sweepRun removes a runtime folder without a pod, and the VM in it.
func (m *Manager) sweepRun(ctx context.Context, dir string) {
	ctx, cancel := context.WithTimeout(ctx, attachLimit)
	defer cancel()
	for _, driver := range m.o.Drivers {
		v, err := driver.Attach(ctx, vmm.Config{ID: filepath.Base(dir), Dir: dir})
		if err == nil {
			err = v.Kill(ctx)
		}
		if err != nil && !errors.Is(err, vmm.ErrGone) {
			slog.Error("end a VM without a pod", "dir", dir, "err", err)
			return
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		slog.Error("remove what belongs to no pod", "dir", dir, "err", err)
	}
}
