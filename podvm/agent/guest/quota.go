package guest

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// quotas count what directories on the scratch disk take, by ext4's project quotas: at once,
// however many files there are.
type quotas struct {
	// root is a directory of the file system; nil where it has no project quotas.
	root *os.File
	last atomic.Uint32
}

// newQuotas looks whether the file system has them.
func newQuotas(dir string) (*quotas, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	q := &quotas{root: f}
	if _, _, err := q.read(0); err != nil {
		f.Close()
		return &quotas{}, nil
	}
	return q, nil
}

// fsxattr is struct fsxattr of linux/fs.h.
type fsxattr struct {
	flags, extent, extents, project, cow uint32
	_                                    [8]byte
}

// Of linux/fs.h: ioctls and the flag by which new files take their folder's project.
const (
	getAttributes = 0x801c581f
	setAttributes = 0x401c5820
	inherit       = 0x200
)

// begin counts an empty directory, and all that will be in it, from now on; 0: it can't.
func (q *quotas) begin(dir string) (project uint32, err error) {
	if q == nil || q.root == nil {
		return 0, nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var a fsxattr
	if err := ioctl(f, getAttributes, unsafe.Pointer(&a)); err != nil {
		return 0, fmt.Errorf("read the project of %s: %w", dir, err)
	}
	a.project = q.last.Add(1)
	a.flags |= inherit
	if err := ioctl(f, setAttributes, unsafe.Pointer(&a)); err != nil {
		return 0, fmt.Errorf("set the project of %s: %w", dir, err)
	}
	return a.project, nil
}

// usage is what a directory takes, in bytes; one that is no project of its own is walked through.
func (q *quotas) usage(ctx context.Context, project uint32, dir string) (bytes, inodes uint64, err error) {
	if q == nil || q.root == nil || project == 0 {
		return diskUsage(ctx, dir)
	}
	return q.read(project)
}

// dqblk is struct if_dqblk of linux/quota.h.
type dqblk struct {
	bhard, bsoft, space, ihard, isoft, inodes, btime, itime uint64
	valid                                                   uint32
	_                                                       uint32
}

// Q_GETQUOTA of project quotas. Source: linux/quota.h.
const getProjectQuota = 0x800007<<8 | 2

func (q *quotas) read(project uint32) (bytes, inodes uint64, err error) {
	var b dqblk
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, q.root.Fd(), getProjectQuota, uintptr(project), uintptr(unsafe.Pointer(&b)), 0, 0)
	if errno != 0 {
		return 0, 0, fmt.Errorf("read the quota of project %d: %w", project, errno)
	}
	return b.space, b.inodes, nil
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
