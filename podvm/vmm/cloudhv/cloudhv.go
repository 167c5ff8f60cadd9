// Package cloudhv runs VMs with Cloud Hypervisor: a REST API on a unix socket, hybrid vsock as the
// channel, memory by virtio-mem, images by virtio-pmem, and snapshots for templates.
package cloudhv

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/internal/undo"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/machine"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
	"github.com/caisson-vm/caisson/podvm/vmm/tail"
)

// Name is the driver's name.
const Name = "cloud-hypervisor"

// Oldest is the first major version that is supported: the first in which a raw disk can be
// declared as one, so that a guest can't turn its disk into another format.
const Oldest = 51

// noise is in a warning that Cloud Hypervisor writes for each range of free memory that a clone's
// guest reports: it can't punch a hole into the template's file, which it opens for reading alone.
const noise = "Fallocate fail"

// small is the environment in which it takes less memory. The stacks of its threads are a little smaller than
// the 2 MiB that they are by default: where the kernel uses huge pages as it likes, one that fits into a stack
// costs each VM 2 MiB. All of them allocate from one heap.
// Source: std::thread::Builder of Rust; mallopt(3) of the GNU C library, which a static build does without.
var small = []string{"RUST_MIN_STACK=1835008", "MALLOC_ARENA_MAX=1"}

// Driver starts VMs with one Cloud Hypervisor binary.
type Driver struct {
	binary  string
	version string
	broken  error // why no VM can be launched
	watcher *watcher
	slow    sync.Once // clones without copies of what they write were told of
}

// New looks the binary up (in PATH, when it is a name) and checks its version. The error is
// errdefs.ErrNotFound when there is none, errdefs.ErrFailedPrecondition when it is too old.
func New(ctx context.Context, binary string) (*Driver, error) {
	path, err := exec.LookPath(binary)
	if err != nil {
		return nil, fmt.Errorf("cloud hypervisor: no %q; install a release, version %d or newer, in PATH or name it in the key vm.cloud_hypervisor: %w", binary, Oldest, errdefs.ErrNotFound)
	}
	version, err := checkVersion(ctx, path)
	if err != nil {
		return nil, err
	}
	w, err := newWatcher()
	if err != nil {
		return nil, err
	}
	return &Driver{binary: path, version: version, watcher: w}, nil
}

// AttachOnly is the driver where New has failed: it attaches, which takes no binary, to VMs that were
// launched before that was so. Launch says why it can't.
func AttachOnly(why error) (*Driver, error) {
	w, err := newWatcher()
	if err != nil {
		return nil, err
	}
	return &Driver{broken: why, watcher: w}, nil
}

var versionPattern = regexp.MustCompile(`v?(\d+)\.\d+\S*`)

func checkVersion(ctx context.Context, path string) (string, error) {
	out, err := exec.CommandContext(ctx, path, "--version").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w: %s", path, err, out)
	}
	match := versionPattern.FindStringSubmatch(string(out))
	if match == nil {
		return "", fmt.Errorf("%s --version: %q has no version: %w", path, out, errdefs.ErrFailedPrecondition)
	}
	if major, err := strconv.Atoi(match[1]); err != nil || major < Oldest {
		return "", fmt.Errorf("%s is version %s; install %d or newer: %w", path, match[0], Oldest, errdefs.ErrFailedPrecondition)
	}
	return match[0], nil
}

// Name implements vmm.Driver.
func (d *Driver) Name() string { return Name }

// Version is Cloud Hypervisor's, as it prints it.
func (d *Driver) Version() string { return d.version }

// Binary is the path of the program.
func (d *Driver) Binary() string { return d.binary }

// MaxCPUs is how many vCPUs a VM can have at most. It takes more (8192 from version 48 on), but with numbers for
// which the node's KVM and the guest's kernel need not have room.
// Source: MAX_SUPPORTED_CPUS_LEGACY of Cloud Hypervisor.
func (d *Driver) MaxCPUs() int { return 254 }

// KVM tells that the VMs run by KVM.
func (d *Driver) KVM() bool { return true }

// Close ends the driver's own work; its VMs run on.
func (d *Driver) Close() error { return d.watcher.notify.Close() }

// Launch implements vmm.Driver.
func (d *Driver) Launch(ctx context.Context, c vmm.Config) (vmm.VM, error) {
	if d.broken != nil {
		return nil, d.broken
	}
	var u undo.Stack
	defer u.Run()
	u.Push("remove VMM files", func(context.Context) error { return removeFiles(c.Dir) })
	l, err := tail.OpenPair(c.Dir, noise)
	if err != nil {
		return nil, err
	}
	u.Push("close logs", func(context.Context) error { return l.Close() })
	p, err := d.start(c, l)
	if err != nil {
		return nil, err
	}
	u.Push("kill VMM", p.Kill)
	v, err := newVM(d, c, p, l)
	if err != nil {
		return nil, err
	}
	u.Push("forget VM", func(context.Context) error { v.forget(); return nil })
	if err := v.boot(ctx); err != nil {
		return nil, v.Explain(err)
	}
	u.Release()
	go v.watch()
	return v, nil
}

// start runs the process. Its API socket listens before it does, so that nobody waits for it.
func (d *Driver) start(c vmm.Config, l tail.Pair) (*process.Process, error) {
	socket, err := machine.Listen(apiPath(c.Dir))
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	log, err := l.VMM.Writer()
	if err != nil {
		return nil, fmt.Errorf("launch %s: %w", Name, err)
	}
	defer log.Close()
	if err := os.WriteFile(eventsPath(c.Dir), nil, 0o600); err != nil {
		return nil, fmt.Errorf("launch %s: %w", Name, err)
	}
	p, err := process.Start(process.Spec{
		Path: d.binary, Dir: c.Dir, Log: log, Files: []*os.File{socket}, Cgroup: c.Cgroup,
		Env:  small,
		Args: []string{"--api-socket", "fd=3", "--event-monitor", "path=" + eventsPath(c.Dir)},
	})
	if err != nil {
		return nil, err
	}
	if err := p.Save(c.Dir); err != nil {
		return nil, errors.Join(err, p.Kill(context.Background()))
	}
	return p, nil
}

// Attach implements vmm.Driver.
func (d *Driver) Attach(ctx context.Context, c vmm.Config) (vmm.VM, error) {
	p, err := process.Load(c.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("attach %s: %w%s", c.ID, vmm.ErrGone, tail.LastWords(c.Dir))
	}
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", c.ID, err)
	}
	l, err := tail.OpenPair(c.Dir, noise)
	if err != nil {
		return nil, err
	}
	v, err := newVM(d, c, p, l)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	close(v.ready)
	v.late = true // a former daemon may have waited
	if err := v.refresh(ctx); err != nil {
		err = v.Explain(err)
		v.forget()
		return nil, errors.Join(err, l.Close())
	}
	go v.watch()
	return v, nil
}

// removeFiles removes what the driver made in the VM's folder, but for its logs.
func removeFiles(dir string) error {
	return errors.Join(os.RemoveAll(apiPath(dir)), os.RemoveAll(vsockPath(dir)), os.RemoveAll(readyPath(dir)),
		os.RemoveAll(eventsPath(dir)), os.RemoveAll(process.SavedPath(dir)), os.RemoveAll(filepath.Join(dir, "restore")),
		os.RemoveAll(tail.PipePath(tail.ConsolePath(dir))), os.RemoveAll(tail.PipePath(tail.VMMPath(dir))))
}
