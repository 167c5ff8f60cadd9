package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func isOverrun(err error) bool { return errors.Is(err, unix.ENOBUFS) }

// disks are the read-only disks (EROFS) of images, each mounted once for all who use it.
type disks struct {
	dir string

	mu     sync.Mutex
	byAddr map[string]*disk
	next   int
}

type disk struct {
	// turn holds a token: who has it may mount and unmount.
	turn chan struct{}
	dir  string
	// mounted and refs belong to disks.mu.
	mounted bool
	refs    int
}

func newDisks(dir string) *disks { return &disks{dir: dir, byAddr: make(map[string]*disk)} }

// use mounts the disk, if it is not, and returns where. It stays until release and detach.
func (d *disks) use(ctx context.Context, addr string, dax bool) (string, error) {
	k := d.get(addr)
	select {
	case <-k.turn:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { k.turn <- struct{}{} }()
	if d.ref(k, false) {
		return k.dir, nil
	}
	ctx, cancel := context.WithTimeout(ctx, deviceWait)
	defer cancel()
	dev, err := findDevice(ctx, addr)
	if err != nil {
		return "", err
	}
	if err := mountImage(dev, k.dir, dax); err != nil {
		return "", fmt.Errorf("disk %s: %w", addr, err)
	}
	d.ref(k, true)
	return k.dir, nil
}

func (d *disks) get(addr string) *disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	k := d.byAddr[addr]
	if k == nil {
		d.next++
		k = &disk{turn: make(chan struct{}, 1), dir: filepath.Join(d.dir, fmt.Sprint(d.next))}
		k.turn <- struct{}{}
		d.byAddr[addr] = k
	}
	return k
}

// ref counts one more user of a disk that is mounted, or was just now.
func (d *disks) ref(k *disk, mounted bool) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if k.mounted = k.mounted || mounted; k.mounted {
		k.refs++
	}
	return k.mounted
}

// release ends one use. The disk stays mounted: a restarted container uses it again.
func (d *disks) release(addr string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if k := d.byAddr[addr]; k != nil && k.refs > 0 {
		k.refs--
	}
}

// detach unmounts a disk that nobody uses; an unknown one is no error.
func (d *disks) detach(ctx context.Context, addr string) error {
	k := d.get(addr)
	select {
	case <-k.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { k.turn <- struct{}{} }()
	d.mu.Lock()
	refs, mounted := k.refs, k.mounted
	d.mu.Unlock()
	if refs > 0 {
		return fmt.Errorf("disk %s is in use by %d mounts: %w", addr, refs, errdefs.ErrFailedPrecondition)
	}
	if mounted {
		if err := unix.Unmount(k.dir, unix.UMOUNT_NOFOLLOW); errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("disk %s is in use: %w", addr, errdefs.ErrFailedPrecondition)
		} else if err != nil {
			return fmt.Errorf("unmount disk %s: %w", addr, err)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	k.mounted = false
	return nil
}

func mountImage(dev, dir string, dax bool) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	if dax {
		// Without DAX where the device can't: slower, not wrong.
		if err := unix.Mount(dev, dir, "erofs", unix.MS_RDONLY, "dax=always"); !errors.Is(err, unix.EINVAL) {
			return wrapMount(dev, err)
		}
	}
	return wrapMount(dev, unix.Mount(dev, dir, "erofs", unix.MS_RDONLY, ""))
}

func wrapMount(dev string, err error) error {
	if err != nil {
		return fmt.Errorf("mount %s as erofs: %w", dev, err)
	}
	return nil
}
