package share

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// attach gives the process the directory: a copy of its mounts, in the process's mount namespace. The
// caller has the turn.
func (p *served) attach(ctx context.Context, d Dir) error {
	tree, err := p.open(ctx, d)
	if err != nil {
		return fmt.Errorf("%s: %w", d.Path, err)
	}
	defer tree.Close()
	ended := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread, which is in another namespace, ends with this
		ended <- p.process.Enter(unix.CLONE_NEWNS, func() error { return place(tree, d.Tag) })
	}()
	if err := <-ended; err != nil {
		return fmt.Errorf("show %s to the process that serves it: %w", d.Path, err)
	}
	return nil
}

// opened is what openTree returned.
type opened struct {
	tree *os.File
	err  error
}

// open is openTree, which may hang with the directory's file system: who comes after a call that was given up
// waits for the same one. The caller has the turn.
func (p *served) open(ctx context.Context, d Dir) (*os.File, error) {
	pending := p.opening[d.Tag]
	if pending == nil {
		pending = make(chan opened, 1)
		p.opening[d.Tag] = pending
		go func() {
			tree, err := openTree(d)
			pending <- opened{tree, err}
		}()
	}
	select {
	case o := <-pending:
		delete(p.opening, d.Tag)
		return o.tree, o.err
	case <-ctx.Done():
		return nil, fmt.Errorf("its file system does not answer: %w", context.Cause(ctx))
	}
}

// place mounts the tree where the process finds it.
func place(tree *os.File, tag string) error {
	at := "/" + tag
	if err := unix.Mkdir(at, 0o700); err != nil && !errors.Is(err, unix.EEXIST) { // of a try that failed
		return err
	}
	return unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// openTree copies the mounts at and below a directory, attached nowhere. No device of them can be opened.
func openTree(d Dir) (*os.File, error) {
	at, err := unix.Openat2(unix.AT_FDCWD, d.Path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, err
	}
	defer unix.Close(at)
	if d.Follow {
		if err := followed(at); err != nil {
			return nil, err
		}
	}
	fd, err := unix.OpenTree(at, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open_tree: %w", err)
	}
	tree := os.NewFile(uintptr(fd), d.Path)
	all := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC, Propagation: unix.MS_PRIVATE}
	if d.Follow {
		all.Propagation = unix.MS_SLAVE
	}
	top := unix.MountAttr{}
	if d.ReadOnly {
		top.Attr_set = unix.MOUNT_ATTR_RDONLY
	}
	if d.Recursive {
		all.Attr_set |= top.Attr_set
	}
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &all)
	if err == nil {
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &top)
	}
	if errors.Is(err, unix.ENOSYS) {
		err = fmt.Errorf("host directories need Linux 5.12 on the node: %w", errdefs.ErrNotImplemented)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount_setattr: %w", err), tree.Close())
	}
	return tree, nil
}

// followed tells whether what is mounted below an open directory is passed on to copies of its mount.
func followed(fd int) error {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return fmt.Errorf("statx: %w", err)
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		its := uint64(m.ID) == st.Mnt_id
		return !its, its
	})
	if err != nil {
		return err
	}
	if len(mounts) != 1 {
		return fmt.Errorf("its mount is in another namespace: %w", errdefs.ErrFailedPrecondition)
	}
	if o := mounts[0].Optional; !strings.Contains(o, "shared:") && !strings.Contains(o, "master:") {
		return fmt.Errorf("propagation HostToContainer: the mount %[1]s passes nothing on; make it shared (mount --make-rshared %[1]s), or use None: %[2]w", mounts[0].Mountpoint, errdefs.ErrFailedPrecondition)
	}
	return nil
}
