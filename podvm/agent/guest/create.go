package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// validID is what can name a container: it becomes part of paths.
var validID = regexp.MustCompile(`^[0-9a-zA-Z][0-9a-zA-Z_.-]{0,127}$`)

// create makes a container that waits to be started.
func (a *Agent) create(ctx context.Context, req *agent.CreateRequest) (*agent.CreateResponse, error) {
	a.mu.Lock()
	ready := a.setup != nil
	a.mu.Unlock()
	if !ready {
		return nil, fmt.Errorf("the guest has not been set up: %w", errdefs.ErrFailedPrecondition)
	}
	_, who, err := a.createOfImage(ctx, req)
	if err != nil {
		return nil, err
	}
	resp := &agent.CreateResponse{Uid: int64(who.uid), Gid: int64(who.gid)}
	for _, g := range who.groups {
		resp.Groups = append(resp.Groups, int64(g))
	}
	return resp, nil
}

// createOfImage makes a container of an image.
func (a *Agent) createOfImage(ctx context.Context, req *agent.CreateRequest) (*container, account, error) {
	c, err := a.reserve(req.Id)
	if err != nil {
		return nil, account{}, err
	}
	who, err := c.create(ctx, req, func(c *container) (string, error) { return c.useImage(ctx, req.Rootfs) })
	return c, who, err
}

// create makes what was reserved, with the files that root finds below its writable layer. It gives
// back the turn.
func (c *container) create(ctx context.Context, req *agent.CreateRequest, root func(*container) (string, error)) (account, error) {
	defer c.unlock()
	who, err := c.make(ctx, req, root)
	if err != nil {
		c.undo.Run()
		c.a.forget(c)
		return account{}, fmt.Errorf("create container %s: %w", req.Id, err)
	}
	go c.relay()
	c.become(func(s *agent.ContainerState) { s.State = agent.State_STATE_CREATED })
	go c.follow()
	return who, nil
}

// reserve returns a new container whose turn the caller has.
func (a *Agent) reserve(id string) (*container, error) {
	if !validID.MatchString(id) {
		return nil, fmt.Errorf("container id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.containers[id] != nil {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrAlreadyExists)
	}
	c := &container{a: a, id: id, turn: make(chan struct{}, 1), exited: make(chan struct{}), out: newOutput()}
	a.containers[id] = c
	return c, nil
}

// make does all of create; what it did is on c.undo.
func (c *container) make(ctx context.Context, req *agent.CreateRequest, root func(*container) (string, error)) (account, error) {
	spec, err := decodeSpec(req.Spec)
	if err != nil {
		return account{}, err
	}
	if c.pidNS, err = c.a.pidNamespace(ctx, req); err != nil {
		return account{}, err
	}
	image, err := root(c)
	if err != nil {
		return account{}, err
	}
	rootfs, err := c.mountRoot(image)
	if err != nil {
		return account{}, err
	}
	who, err := resolveUser(rootfs, req.User)
	if err != nil {
		return account{}, err
	}
	m := mounting{c: c, spec: spec}
	defer m.close()
	wanted, err := m.all(ctx, req.Mounts)
	if err != nil {
		return account{}, err
	}
	volumes, err := c.imageVolumes(image, req.Volumes)
	if err != nil {
		return account{}, err
	}
	spec.Mounts = c.a.arrange(spec.Mounts, append(volumes, wanted...))
	if err := giveDevices(spec); err != nil {
		return account{}, err
	}
	c.complete(spec, rootfs, req.Rootfs.GetReadonly(), who)
	config, err := json.Marshal(spec)
	if err != nil {
		return account{}, err
	}
	if err := os.WriteFile(filepath.Join(c.dir, "config.json"), config, 0o600); err != nil {
		return account{}, err
	}
	c.process, c.stdinOnce = spec.Process, req.StdinOnce
	return who, c.spawn(ctx, req.Stdin, spec.Process.Terminal)
}

// spawn has crun make the container's process.
func (c *container) spawn(ctx context.Context, stdin, tty bool) (err error) {
	c.io = &stdio{theirs: make([]*os.File, 3)}
	if !tty {
		if c.io, err = openPipes(stdin, true, true); err != nil {
			return err
		}
	}
	c.undo.Push("close the container's pipes", func(context.Context) error {
		c.out.close()
		c.io.close()
		return nil
	})
	// Whatever crun made of it, also when it failed.
	c.undo.Push("delete the container", func(ctx context.Context) error {
		return c.a.crun(ctx, nil, "delete", "--force", c.id)
	})
	c.proc, err = c.a.spawn(ctx, c.dir, tty, c.io, []string{"create", "--no-new-keyring", "--bundle=" + c.dir}, []string{c.id})
	var refused refusal
	if errors.As(err, &refused) {
		c.failed, c.proc = newFailure(refused)
		return nil
	}
	return err
}

// useImage mounts the image, where it is not yet, and returns where.
func (c *container) useImage(ctx context.Context, r *agent.Rootfs) (string, error) {
	if r.GetImageAddr() == "" {
		return "", fmt.Errorf("no image: %w", errdefs.ErrInvalidArgument)
	}
	image, err := c.a.disks.use(ctx, r.ImageAddr, r.Dax)
	if err != nil {
		return "", fmt.Errorf("image: %w", err)
	}
	c.undo.Push("release the image", func(context.Context) error { c.a.disks.release(r.ImageAddr); return nil })
	return image, nil
}

// mountRoot mounts the directory image with a writable layer on it.
func (c *container) mountRoot(image string) (rootfs string, err error) {
	c.dir = c.a.path("containers", c.id)
	scratch, quotas := c.a.storage()
	c.layer = filepath.Join(scratch, "layers", c.id)
	c.undo.Push("delete the bundle", func(context.Context) error { return os.RemoveAll(c.dir) })
	c.undo.Push("delete the layer", func(context.Context) error { return removeAll(c.layer) })
	rootfs = filepath.Join(c.dir, "rootfs")
	upper, work := filepath.Join(c.layer, "upper"), filepath.Join(c.layer, "work")
	if err := os.MkdirAll(c.layer, 0o711); err != nil {
		return "", err
	}
	if c.project, err = quotas.begin(c.layer); err != nil {
		return "", err
	}
	for _, dir := range []string{rootfs, upper, work} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return "", err
		}
	}
	if err := sameRoot(image, upper); err != nil {
		return "", err
	}
	// Volatile: a layer is worth nothing once its guest has ended, so that nobody needs its syncs.
	data := strings.Join([]string{"lowerdir=" + image, "upperdir=" + upper, "workdir=" + work, "volatile"}, ",")
	if err := unix.Mount("overlay", rootfs, "overlay", 0, data); err != nil {
		return "", fmt.Errorf("mount the writable layer: %w", err)
	}
	c.undo.Push("unmount the root file system", func(context.Context) error { return unix.Unmount(rootfs, unix.MNT_DETACH) })
	return rootfs, nil
}

// sameRoot gives the layer's root the owner and mode of the image's, which it hides.
func sameRoot(image, upper string) error {
	var st unix.Stat_t
	if err := unix.Stat(image, &st); err != nil {
		return fmt.Errorf("root of the image: %w", err)
	}
	if err := os.Chown(upper, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return unix.Chmod(upper, st.Mode&0o7777)
}
