// Package vmmtest has what tests of drivers and of their users share.
package vmmtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// Fake is a driver whose VMs are in this process: they outlive who launched them, and every stream
// that is dialled to one is answered by Serve. Each has a process beside it, as a VMM is one, and ends
// when that is killed.
type Fake struct {
	// Serve answers one stream, and closes it. It is called in a goroutine of its own.
	Serve func(vm *FakeVM, c net.Conn)
	// Refuse, where set, is why a VM does not start.
	Refuse func(vmm.Config) error

	mu   sync.Mutex
	vms  map[string]*FakeVM // by Config.Dir
	fail map[string]error
}

// Fail has a method ("Launch", "Attach", "Dial", "AddDisk", "RemoveDisk", "AddNIC", "Resize", "Kill")
// return the error, until it is called with nil.
func (f *Fake) Fail(method string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail == nil {
		f.fail = map[string]error{}
	}
	f.fail[method] = err
}

func (f *Fake) failure(ctx context.Context, method string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fail[method]
}

// Name is "fake".
func (f *Fake) Name() string { return "fake" }

// VMs are those that run.
func (f *Fake) VMs() []*FakeVM {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*FakeVM
	for _, v := range f.vms {
		if !v.ended() {
			all = append(all, v)
		}
	}
	return all
}

// Launch holds its caller to what Config asks for.
func (f *Fake) Launch(ctx context.Context, c vmm.Config) (vmm.VM, error) {
	if err := f.failure(ctx, "Launch"); err != nil {
		return nil, err
	}
	if f.Refuse != nil {
		if err := f.Refuse(c); err != nil {
			return nil, err
		}
	}
	entries, err := os.ReadDir(c.Dir)
	if err != nil {
		return nil, err
	}
	if len(entries) > 0 {
		return nil, fmt.Errorf("launch %s: %s is not empty: %w", c.ID, c.Dir, errdefs.ErrInvalidArgument)
	}
	if c.Cgroup != "" {
		if _, err := os.Stat(c.Cgroup); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(c.Dir, "console.log"), []byte("fake\n"), 0o600); err != nil {
		return nil, err
	}
	v := &FakeVM{driver: f, config: c, size: c.Size, done: make(chan struct{}), disks: map[string]vmm.Disk{}}
	if c.Disk != nil {
		if _, err := os.Stat(c.Disk.Path); err != nil {
			return nil, err
		}
		v.disks[c.Disk.Serial] = *c.Disk
	}
	if err := v.startProcess(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.vms == nil {
		f.vms = map[string]*FakeVM{}
	}
	f.vms[c.Dir] = v
	return v, nil
}

// Attach finds the VM by its Dir alone, as those who sweep do.
func (f *Fake) Attach(ctx context.Context, c vmm.Config) (vmm.VM, error) {
	if err := f.failure(ctx, "Attach"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.vms[c.Dir]
	if v == nil || v.ended() {
		return nil, fmt.Errorf("attach to %s: %w", c.ID, vmm.ErrGone)
	}
	return v, nil
}

// FakeVM is a VM of a Fake.
type FakeVM struct {
	driver  *Fake
	config  vmm.Config
	process *process.Process
	life    *os.File // while it is open here, the process runs
	done    chan struct{}

	mu    sync.Mutex
	size  vmm.Size
	err   error
	disks map[string]vmm.Disk
	nics  []vmm.NIC
	conns []net.Conn
}

// startProcess starts one that does nothing, and ends with this one at the latest.
func (v *FakeVM) startProcess() error {
	theirs, ours, err := os.Pipe()
	if err != nil {
		return err
	}
	defer theirs.Close()
	v.life = ours
	v.process, err = process.Start(process.Spec{Path: "/bin/cat", Args: []string{"/proc/self/fd/3"}, Files: []*os.File{theirs}})
	if err != nil {
		ours.Close()
		return err
	}
	go func() {
		<-v.process.Done()
		v.End(errors.New("its process was killed"))
	}()
	return v.process.Save(v.config.Dir)
}

// ID is that of its Config.
func (v *FakeVM) ID() string { return v.config.ID }

// Config is what it was launched with.
func (v *FakeVM) Config() vmm.Config { return v.config }

// Disks are those it has.
func (v *FakeVM) Disks() []vmm.Disk {
	v.mu.Lock()
	defer v.mu.Unlock()
	var all []vmm.Disk
	for _, d := range v.disks {
		all = append(all, d)
	}
	return all
}

// NICs are those it has, in the order in which they were added; their taps are not open.
func (v *FakeVM) NICs() []vmm.NIC {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.nics)
}

func (v *FakeVM) ended() bool {
	select {
	case <-v.done:
		return true
	default:
		return false
	}
}

// End ends the VM for the reason given, and its streams with it.
func (v *FakeVM) End(reason error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended() {
		return
	}
	v.err = reason
	v.life.Close()
	<-v.process.Done()
	os.Remove(process.SavedPath(v.config.Dir))
	close(v.done)
	for _, c := range v.conns {
		c.Close()
	}
}

func (v *FakeVM) failure(ctx context.Context, method string) error {
	if v.ended() {
		return fmt.Errorf("%s: %w", method, vmm.ErrGone)
	}
	return v.driver.failure(ctx, method)
}

// Dial implements vmm.VM.
func (v *FakeVM) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if err := v.failure(ctx, "Dial"); err != nil {
		return nil, err
	}
	if port != vmm.AgentPort {
		return nil, fmt.Errorf("dial port %d: %w", port, errdefs.ErrUnavailable)
	}
	ours, theirs, err := Pair()
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	v.conns = append(v.conns, ours, theirs)
	v.mu.Unlock()
	if v.ended() {
		ours.Close()
		theirs.Close()
		return nil, fmt.Errorf("dial: %w", vmm.ErrGone)
	}
	go v.driver.Serve(v, theirs)
	return ours, nil
}

// AddDisk implements vmm.VM.
func (v *FakeVM) AddDisk(ctx context.Context, d vmm.Disk) (string, error) {
	if err := v.failure(ctx, "AddDisk"); err != nil {
		return "", err
	}
	if err := vmm.CheckSerial(d.Serial); err != nil {
		return "", err
	}
	if _, err := os.Stat(d.Path); err != nil {
		return "", err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.disks[d.Serial]; ok {
		return "", fmt.Errorf("disk %s: %w", d.Serial, errdefs.ErrAlreadyExists)
	}
	v.disks[d.Serial] = d
	if d.Shared {
		return "pci:" + d.Serial, nil
	}
	return vmm.SerialAddress(d.Serial), nil
}

// RemoveDisk implements vmm.VM.
func (v *FakeVM) RemoveDisk(ctx context.Context, serial string) error {
	if err := v.failure(ctx, "RemoveDisk"); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.disks[serial]; !ok {
		return fmt.Errorf("disk %s: %w", serial, errdefs.ErrNotFound)
	}
	delete(v.disks, serial)
	return nil
}

// AddNIC implements vmm.VM.
func (v *FakeVM) AddNIC(ctx context.Context, n vmm.NIC) error {
	if err := v.failure(ctx, "AddNIC"); err != nil {
		return err
	}
	if _, err := n.Tap.Stat(); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.nics = append(v.nics, n)
	return nil
}

// Resize implements vmm.VM.
func (v *FakeVM) Resize(ctx context.Context, s vmm.Size) (vmm.Size, error) {
	if err := v.failure(ctx, "Resize"); err != nil {
		return vmm.Size{}, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if s.CPUs < 1 || s.CPUs > v.config.Max.CPUs || s.Memory > v.config.Max.Memory {
		return v.size, fmt.Errorf("size %+v is beyond %+v: %w", s, v.config.Max, errdefs.ErrOutOfRange)
	}
	v.size = vmm.Size{CPUs: s.CPUs, Memory: min(s.Memory, v.config.Most().Memory)}
	return v.size, nil
}

// Info implements vmm.VM.
func (v *FakeVM) Info() vmm.Info {
	v.mu.Lock()
	defer v.mu.Unlock()
	return vmm.Info{PID: v.process.PID(), Size: v.size, Err: v.err}
}

// Done implements vmm.VM.
func (v *FakeVM) Done() <-chan struct{} { return v.done }

// Kill implements vmm.VM.
func (v *FakeVM) Kill(ctx context.Context) error {
	if err := v.driver.failure(ctx, "Kill"); err != nil {
		return err
	}
	v.End(fmt.Errorf("killed: %w", vmm.ErrGone))
	return nil
}

// Pair returns two connected streams with half-close.
func Pair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	if a, err = conn(fds[0]); err != nil {
		unix.Close(fds[1])
		return nil, nil, err
	}
	if b, err = conn(fds[1]); err != nil {
		a.Close()
		return nil, nil, err
	}
	return a, b, nil
}

func conn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "pair")
	defer f.Close()
	return net.FileConn(f)
}
