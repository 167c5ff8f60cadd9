package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// shmSize is the size of a pod's /dev/shm where none is given, in bytes.
const shmSize = 64 << 20

// doSetup makes this guest the pod's. The clock and the entropy come first: nothing of the pod may
// see those of the template.
func (a *Agent) doSetup(ctx context.Context, req *agent.SetupRequest) (*agent.SetupResponse, error) {
	if done, err := a.begun(req.PodId); done != nil || err != nil {
		return done, err
	}
	if req.ClockNs != 0 {
		ts := unix.NsecToTimespec(req.ClockNs)
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
			return nil, fmt.Errorf("set the clock: %w", err)
		}
	}
	if err := a.entropy.credit(req.Entropy); err != nil {
		return nil, fmt.Errorf("feed the kernel's random pool: %w", err)
	}
	if err := a.prepare(ctx, req.ScratchAddr); err != nil {
		return nil, err
	}
	if err := a.identity(req); err != nil {
		return nil, err
	}
	if err := a.sizeShm(req.ShmSize); err != nil {
		return nil, err
	}
	if req.Network != nil {
		if err := a.network(ctx, req.Network); err != nil {
			return nil, err
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	resp := &agent.SetupResponse{Kernel: unix.ByteSliceToString(u.Release[:]), Agent: a.o.Version}
	if req.PodId != rehearsal {
		var err error
		if resp.BootId, err = bootID(); err != nil {
			return nil, err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.setup, a.podID = resp, req.PodId
	return resp, nil
}

// network connects the pod, and sets its kernel parameters.
func (a *Agent) network(ctx context.Context, req *agent.NetworkRequest) error {
	if err := a.cards.configure(ctx, req); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(req.Sysctls)) { // what is for all cards before what is for one, eth0
		if err := sysctl(name, req.Sysctls[name]); err != nil {
			return err
		}
	}
	return nil
}

// begun returns the answer to a Setup that is repeated.
func (a *Agent) begun(pod string) (*agent.SetupResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.setup != nil && a.podID != pod {
		return nil, fmt.Errorf("this guest is already that of pod %s: %w", a.podID, errdefs.ErrFailedPrecondition)
	}
	return a.setup, nil
}

// sysctl sets a kernel parameter by its name: dots for slashes, as sysctl(8), or slashes.
func sysctl(name, value string) error {
	file := name
	if !strings.Contains(name, "/") {
		file = strings.ReplaceAll(name, ".", "/")
	}
	if file = path.Join("/proc/sys", file); !strings.HasPrefix(file, "/proc/sys/") {
		return fmt.Errorf("sysctl %q: not the name of one: %w", name, errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("sysctl %q: the guest's kernel has none of that name: %w", name, errdefs.ErrInvalidArgument)
	} else if err != nil {
		return fmt.Errorf("sysctl %q: %w", name, err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("sysctl %s=%q: %w: %w", name, value, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// doPrepare makes this guest one that any pod's can begin as.
func (a *Agent) doPrepare(ctx context.Context, req *agent.PrepareRequest) error {
	if req.CardMac != "" {
		if err := a.cards.prepare(ctx, req.CardMac); err != nil {
			return fmt.Errorf("network card %s: %w", req.CardMac, err)
		}
	}
	if err := a.prepare(ctx, req.ScratchAddr); err != nil {
		return err
	}
	if a.o.Template != nil {
		if err := a.o.Template(); err != nil {
			slog.Error("get ready to be a template: clones will be slower", "err", err)
		}
	}
	// A pod that has no use for them has them for nothing, as a clone does not touch them.
	if _, err := a.pid.path(ctx); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.pack != nil {
		return nil
	}
	var err error
	a.pack, err = keepPack()
	return err
}

// prepare makes what every pod has: /dev/shm, the containers' cgroup, the scratch disk. It is done
// once; a clone has it from its template.
func (a *Agent) prepare(ctx context.Context, scratchAddr string) error {
	a.mu.Lock()
	done := a.prepared
	a.mu.Unlock()
	if done {
		return nil
	}
	if err := a.mountShm(); err != nil {
		return err
	}
	names, err := a.openNames()
	if err != nil {
		return err
	}
	if !a.o.NoCgroups {
		if err := makePodCgroup(); err != nil {
			return err
		}
	}
	scratch, quotas := a.o.Root, (*quotas)(nil)
	if scratchAddr != "" {
		var err error
		if scratch, err = a.mountScratch(ctx, scratchAddr); err != nil {
			return err
		}
		if quotas, err = newQuotas(scratch); err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.prepared, a.names, a.scratch, a.quotas = true, names, scratch, quotas
	return nil
}

const shmFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mountShm makes the /dev/shm that all containers share.
func (a *Agent) mountShm() error {
	dir := a.path("shm")
	if err := os.MkdirAll(dir, 0o1777); err != nil {
		return err
	}
	if err := unix.Mount("shm", dir, "tmpfs", shmFlags, fmt.Sprintf("mode=1777,size=%d", shmSize)); err != nil {
		return fmt.Errorf("mount the pod's /dev/shm: %w", err)
	}
	return nil
}

// sizeShm gives /dev/shm another size than the usual one, in bytes; 0 leaves it.
func (a *Agent) sizeShm(size int64) error {
	if size <= 0 || size == shmSize {
		return nil
	}
	if err := unix.Mount("shm", a.path("shm"), "tmpfs", shmFlags|unix.MS_REMOUNT, fmt.Sprintf("size=%d", size)); err != nil {
		return fmt.Errorf("give the pod's /dev/shm %d bytes: %w", size, err)
	}
	return nil
}

// scratchOptions leave ext4 nothing to do in the background, some seconds after the mount: a clone would do
// it again, and have the memory for its own. The disk's file is sparse, so that its inode tables need not be
// cleared; and the bitmaps of its block groups, three pages each, are read where a pod writes. Linux before
// 5.13 does not know the last one, nor do what it is against.
const scratchOptions = "discard,noinit_itable,no_prefetch_block_bitmaps"

// mountScratch mounts the disk for writable layers and emptyDirs, and returns where.
func (a *Agent) mountScratch(ctx context.Context, addr string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, deviceWait)
	defer cancel()
	dev, err := findDevice(ctx, addr)
	if err != nil {
		return "", fmt.Errorf("scratch disk: %w", err)
	}
	dir := a.path("scratch")
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", err
	}
	err = unix.Mount(dev, dir, "ext4", 0, scratchOptions)
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount(dev, dir, "ext4", 0, scratchOptions[:strings.LastIndexByte(scratchOptions, ',')])
	}
	if err != nil {
		return "", fmt.Errorf("mount the scratch disk %s (%s): %w", addr, dev, err)
	}
	for _, sub := range []string{"layers", "volumes"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o711); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// deviceWait bounds the wait for a device that the host has plugged in.
const deviceWait = 30 * time.Second
