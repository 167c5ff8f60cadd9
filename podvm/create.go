package podvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/internal/undo"
	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// Create makes a container in the pod; Start runs it. A call for a container of the same name and
// attempt as one that is there returns that one: it is the retry of a call that went on.
func (p *Pod) Create(ctx context.Context, c ContainerConfig) (*Container, error) {
	ctx, cancel := operation(ctx, opLimit)
	defer cancel()
	if err := p.change.lock(ctx); err != nil {
		return nil, err
	}
	defer p.change.unlock()
	for _, old := range p.Containers() {
		if s := old.Status(); s.Config.Name == c.Name && s.Config.Attempt == c.Attempt {
			if s.State == Created {
				return old, nil
			}
			return nil, fmt.Errorf("container %s, attempt %d, is there as %s and %s: %w", c.Name, c.Attempt, old.id, s.State, errdefs.ErrAlreadyExists)
		}
	}
	made, err := p.create(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", c.Name, err)
	}
	return made, nil
}

func (p *Pod) create(ctx context.Context, config ContainerConfig) (*Container, error) {
	rpc, err := p.rpc(ctx)
	if err != nil {
		return nil, err
	}
	var u undo.Stack
	defer u.Run()
	image, address, err := p.attachImage(ctx, config.Image)
	if err != nil {
		return nil, err
	}
	request, record, err := p.request(ctx, config, image, address)
	if err != nil {
		return nil, err
	}
	c := p.containerOf(record)
	if err := c.save(); err != nil {
		return nil, err
	}
	u.Push("remove container", func(context.Context) error { return c.removeFiles() })
	if err := p.grow(ctx, config.Resources); err != nil {
		return nil, err
	}
	made, err := rpc.Create(ctx, request)
	if err != nil {
		return nil, err
	}
	u.Push("remove container from the guest", func(ctx context.Context) error {
		_, err := rpc.Remove(ctx, &agent.RemoveRequest{Id: c.id})
		return err
	})
	if err := c.becomeCreated(made); err != nil {
		return nil, err
	}
	u.Release()
	slog.Info("container created", "pod", p.id, "container", c.id, "name", config.Name, "ms", time.Since(c.created).Milliseconds())
	p.m.events.send(Event{Kind: EventCreated, Pod: p.Status(), Container: c.Status()})
	return c, nil
}

// request is what the guest is asked for, and what is recorded of it.
func (p *Pod) request(ctx context.Context, config ContainerConfig, image imagestore.Image, address string) (*agent.CreateRequest, containerRecord, error) {
	record := containerRecord{
		ID: newID(), Pod: p.id, Config: config, ImageRef: imageRef(image), State: Unknown, Created: time.Now(),
		StopSignal: config.StopSignal, WriteBack: map[string]string{},
	}
	if record.StopSignal == "" {
		record.StopSignal = image.Config.Config.StopSignal
	}
	p.mu.Lock()
	pod := p.record.Config
	p.mu.Unlock()
	spec, err := ociSpec(pod, config, image.Config.Config)
	if err != nil {
		return nil, record, err
	}
	if record.Process, err = json.Marshal(spec.Process); err != nil {
		return nil, record, err
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return nil, record, err
	}
	mounts, err := p.mounts(ctx, config, &record)
	if err != nil {
		return nil, record, err
	}
	r := &agent.CreateRequest{
		Id: record.ID, Spec: data, Rootfs: &agent.Rootfs{ImageAddr: address, Dax: strings.HasPrefix(address, "pci:"), Readonly: config.Security.ReadOnlyRootfs},
		Mounts: mounts, User: guestUser(config.Security.User, image.Config.Config.User),
		Stdin: config.Stdin, StdinOnce: config.StdinOnce,
	}
	switch config.Security.PIDMode {
	case "pod":
		r.SharePid = true
	case "node":
		r.GuestPid = true
	case "target":
		r.TargetPid = config.Security.TargetContainer
	}
	return r, record, nil
}

// imageRef names the image as the kubelet compares it: by its id.
func imageRef(i imagestore.Image) string { return i.ID }

// guestUser is who the guest looks up in the image's files.
func guestUser(u User, imageUser string) *agent.User {
	g := &agent.User{StrictGroups: u.StrictGroups}
	for _, id := range u.SupplementalGroups {
		g.SupplementalGroups = append(g.SupplementalGroups, uint32(id))
	}
	switch {
	case u.UID != nil:
		g.Uid, g.HasUid = *u.UID, true
	case u.Name != "":
		g.Name = u.Name
	default:
		g.Name = imageUser
	}
	if u.GID != nil {
		g.Gid, g.HasGid = *u.GID, true
	}
	return g
}

// attachImage gives the VM an image's disk, once, and returns the disk's address in the guest. The
// link in the pod's folder is its lease on the image.
func (p *Pod) attachImage(ctx context.Context, id string) (imagestore.Image, string, error) {
	name := strings.TrimPrefix(id, "sha256:")
	path := p.m.layout.image(p.id, name)
	image, err := p.m.o.Images.Link(id, path)
	if err != nil && !errors.Is(err, errdefs.ErrAlreadyExists) && !errors.Is(err, fs.ErrExist) {
		return image, "", fmt.Errorf("image %s: %w", id, err)
	}
	p.mu.Lock()
	address := p.record.Disks[image.ID]
	p.mu.Unlock()
	if address != "" {
		return image, address, nil
	}
	serial := name[:min(len(name), vmm.SerialMax)]
	address, err = p.machine().AddDisk(ctx, vmm.Disk{Serial: serial, Path: path, ReadOnly: true, Shared: true})
	if err != nil {
		return image, "", errors.Join(err, os.Remove(path))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.record.Disks[image.ID] = address
	return image, address, p.saveLocked()
}

// containerOf makes a container of its record and makes it visible in its pod.
func (p *Pod) containerOf(r containerRecord) *Container {
	c := &Container{
		id: r.ID, pod: p, created: r.Created, change: make(semaphore, 1), record: r,
		exited: make(chan struct{}), logged: make(chan struct{}),
	}
	if r.State == Exited {
		close(c.exited)
		close(c.logged)
	}
	return c
}

// becomeCreated records the container and makes it visible.
func (c *Container) becomeCreated(made *agent.CreateResponse) error {
	c.mu.Lock()
	c.record.State = Created
	c.record.User = &ResolvedUser{UID: made.Uid, GID: made.Gid, SupplementalGroups: made.Groups}
	err := c.saveLocked()
	c.mu.Unlock()
	if err != nil {
		return err
	}
	if err := c.openLog(); err != nil {
		return err
	}
	c.pod.m.addContainer(c)
	return nil
}

func (m *Manager) addContainer(c *Container) {
	m.mu.Lock()
	m.containers[c.id] = c
	m.mu.Unlock()
	c.pod.mu.Lock()
	c.pod.containers[c.id] = c
	c.pod.mu.Unlock()
}

func (m *Manager) forgetContainer(c *Container) {
	m.mu.Lock()
	delete(m.containers, c.id)
	m.mu.Unlock()
	c.pod.mu.Lock()
	delete(c.pod.containers, c.id)
	c.pod.mu.Unlock()
}

// logFile is the absolute path of the container's log, "" if it has none.
func (c *Container) logFile() string {
	c.pod.mu.Lock()
	dir := c.pod.record.Config.LogDir
	c.pod.mu.Unlock()
	if dir == "" || c.record.Config.LogPath == "" {
		return ""
	}
	return filepath.Join(dir, c.record.Config.LogPath)
}
