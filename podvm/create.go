package podvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"os"
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
	defer p.m.pool.use()()
	for _, old := range p.Containers() {
		if r := old.record.now(); r.Config.Name == c.Name && r.Config.Attempt == c.Attempt {
			if r.State == Created {
				return old, nil
			}
			return nil, fmt.Errorf("container %s, attempt %d, is there as %s and %s: %w", c.Name, c.Attempt, old.id, r.State, errdefs.ErrAlreadyExists)
		}
	}
	err := p.noSecond(ctx, c.Name)
	var made *Container
	if err == nil {
		made, err = p.create(ctx, c)
	}
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
	// What an earlier call has attached, and could not record, would be unknown to the next daemon.
	if err := p.record.settle(); err != nil {
		return nil, err
	}
	now := time.Now()
	n := newContainer{Pod: p, stopwatch: stopwatch{began: now}, record: containerRecord{
		ID: newID(), Pod: p.id, Config: config, State: Created, Created: now, WriteBack: map[string]string{},
	}}
	request, err := n.request(ctx)
	if err != nil {
		return nil, err
	}
	c := p.containerOf(n.record)
	var u undo.Stack
	defer u.Run()
	u.Push("remove container's files", func(context.Context) error { return c.removeFiles() })
	if err := c.openLog(); err != nil {
		return nil, err
	}
	u.Push("discard log", func(context.Context) error { return c.log.discard() })
	if err := n.time("size", func() error { return p.grow(ctx, config.Resources) }); err != nil {
		return nil, err
	}
	u.Push("remove container from the guest", func(ctx context.Context) error {
		if !p.running() {
			return nil
		}
		_, err := rpc.Remove(ctx, &agent.RemoveRequest{Id: c.id})
		return err
	})
	var made *agent.CreateResponse
	if err := n.time("guest", func() (err error) {
		made, err = n.askGuest(ctx, rpc, request)
		return err
	}); err != nil {
		return nil, err
	}
	if err := checkGroups(made.Groups); err != nil {
		return nil, err
	}
	err = c.record.set(func(r *containerRecord) {
		r.User = &ResolvedUser{UID: made.Uid, GID: made.Gid, SupplementalGroups: made.Groups}
		r.Phases = n.all(nil)
	})
	if err != nil {
		return nil, err
	}
	u.Release()
	warnPinned(c.id, Resources{}, config.Resources)
	c.followOutput()
	p.add(c)
	p.rank()
	n.catchUp()
	slog.Info("container created", "pod", p.id, "container", c.id, "name", config.Name, "ms", time.Since(c.created).Milliseconds())
	p.m.events.send(Event{Kind: EventCreated, Pod: p.Status(), Container: c.Status()})
	return c, nil
}

// groupsMax is how many groups a process may have.
// Source: NGROUPS_MAX of linux/limits.h.
const groupsMax = 65536

// checkGroups refuses what a guest can't have found: the record would keep it.
func checkGroups(groups []int64) error {
	if len(groups) > groupsMax {
		return fmt.Errorf("the guest gives the container %d groups, at most %d are possible", len(groups), groupsMax)
	}
	for _, id := range groups {
		if id < 0 || id > math.MaxUint32 {
			return fmt.Errorf("the guest gives the container the group %d, which can't be", id)
		}
	}
	return nil
}

// newContainer is a container that is being made.
type newContainer struct {
	*Pod
	stopwatch
	record containerRecord
	read   map[string]string // volumes that were copied: the version of each
	inline int               // bytes of files in the request
	ahead  []fileSet         // files that the guest is to have before it
}

// request is what the guest is asked for. It fills in the record.
func (n *newContainer) request(ctx context.Context) (*agent.CreateRequest, error) {
	r := &n.record
	var image imagestore.Image
	var address string
	err := n.time("image", func() (err error) {
		image, address, err = n.attachImage(ctx, r.Config.Image)
		return err
	})
	if err != nil {
		return nil, err
	}
	r.ImageRef, r.StopSignal = image.Ref(r.Config.ImageName), r.Config.StopSignal
	if _, err := signalNumber(r.StopSignal); err != nil {
		return nil, fmt.Errorf("stop signal: %w", err)
	}
	if _, err := signalNumber(image.Config.Config.StopSignal); err == nil && r.StopSignal == "" {
		r.StopSignal = image.Config.Config.StopSignal
	}
	pod := n.Pod.record.now().Config
	pod.Hostname = hostname(n.id, pod)
	spec, err := ociSpec(pod, r.Config, image.Config.Config)
	if err != nil {
		return nil, err
	}
	if r.Process, err = json.Marshal(spec.Process); err != nil {
		return nil, err
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	var mounts []*agent.Mount
	if err := n.time("mounts", func() (err error) {
		mounts, err = n.mounts(ctx)
		return err
	}); err != nil {
		return nil, err
	}
	volumes, err := imageVolumes(image.Config.Config.Volumes, r.Config.Mounts)
	if err != nil {
		return nil, err
	}
	s := r.Config.Security
	return &agent.CreateRequest{
		Id: r.ID, Spec: data, Rootfs: &agent.Rootfs{ImageAddr: address, Dax: isPMEM(address), Readonly: s.ReadOnlyRootfs},
		Mounts: mounts, Volumes: volumes, User: guestUser(s.User, image.Config.Config.User),
		Stdin: r.Config.Stdin, StdinOnce: r.Config.StdinOnce,
		SharePid: s.PIDMode == "pod", GuestPid: s.PIDMode == "node", TargetPid: s.targetPID(),
	}, nil
}

// targetPID is the container whose processes are to be seen.
func (s Security) targetPID() string {
	if s.PIDMode == "target" {
		return s.TargetContainer
	}
	return ""
}

// isPMEM tells whether the address, of vmm.VM.AddDisk, is that of a device whose pages are the host's.
func isPMEM(address string) bool { return strings.HasPrefix(address, "pci:") }

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
// link in the pod's folder is its lease on the image; it stays what it is when the image is removed
// and pulled again: the id is the content's.
func (p *Pod) attachImage(ctx context.Context, id string) (imagestore.Image, string, error) {
	name := strings.TrimPrefix(id, "sha256:")
	if !isHex(name) {
		return imagestore.Image{}, "", fmt.Errorf("image %q: want its id: %w", id, errdefs.ErrInvalidArgument)
	}
	if address := p.record.now().Disks[id]; address != "" {
		image, err := p.m.o.Images.Image(id)
		if err != nil {
			return image, "", fmt.Errorf("image %s: %w", id, err)
		}
		return image, address, nil
	}
	path := p.m.layout.image(p.id, name)
	image, err := p.m.o.Images.Link(id, path)
	if errdefs.IsAlreadyExists(err) { // a link to an earlier pull, of a daemon that died before it had attached it
		if err = remove(path); err == nil {
			image, err = p.m.o.Images.Link(id, path)
		}
	}
	if err != nil {
		return image, "", fmt.Errorf("image %s: %w", id, err)
	}
	disk := vmm.Disk{Serial: name[:min(len(name), vmm.SerialMax)], Path: path, ReadOnly: true, Shared: p.m.o.DAX && p.hasRoomToMap(path)}
	address, err := p.attachDisk(ctx, image.ID, disk)
	if err != nil && p.record.now().Disks[image.ID] == "" {
		err = errors.Join(err, remove(path))
	}
	return image, address, err
}

// isID tells whether it can be the id of a pod or container.
func isID(s string) bool { return len(s) == 64 && isHex(s) }

func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdef") == ""
}

// remove removes a file, if it is there.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mappedMax bounds the images that a guest maps, as a multiple of its memory: it keeps 64 bytes for each page that
// is mapped, of memory of its own, whether or not it reads the page.
// Source: devm_memremap_pages of the Linux kernel.
const mappedMax = 2

// hasRoomToMap tells whether the guest can map an image beside those that it has mapped.
func (p *Pod) hasRoomToMap(path string) bool {
	v := p.machine()
	if v == nil {
		return false
	}
	total := fileSize(path)
	for id, address := range p.record.now().Disks {
		if isPMEM(address) {
			total += fileSize(p.m.layout.image(p.id, strings.TrimPrefix(id, "sha256:")))
		}
	}
	return total <= mappedMax*v.Info().Size.Memory
}

// fileSize is 0 for a file that is not there.
func fileSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// attachDisk gives the VM a disk, once, and records its address under the key.
func (p *Pod) attachDisk(ctx context.Context, key string, d vmm.Disk) (string, error) {
	if address := p.record.now().Disks[key]; address != "" {
		return address, nil
	}
	v := p.machine()
	if v == nil {
		return "", p.notReady()
	}
	address, err := v.AddDisk(ctx, d)
	if errors.Is(err, errdefs.ErrAlreadyExists) { // a daemon died before it had recorded the address
		if err = v.RemoveDisk(ctx, d.Serial); err == nil {
			address, err = v.AddDisk(ctx, d)
		}
	}
	if err != nil {
		return "", err
	}
	err = p.record.set(func(r *podRecord) {
		r.Disks = maps.Clone(r.Disks)
		if r.Disks == nil {
			r.Disks = map[string]string{}
		}
		r.Disks[key] = address
	})
	return address, err
}
