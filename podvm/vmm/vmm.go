// Package vmm is the seam between a pod and the virtual machine monitor that runs it. Its
// implementations are in the folders below it, and all pass the contract in vmmtest.
//
// A VM boots with what every pod has: kernel, initramfs, the channel to the agent, a disk to write to,
// a network card, room for hotplug. What only some have (images, further cards, vCPUs, memory) is
// added afterwards, so that a cold boot and a clone of a template are used in the same way.
package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/containerd/errdefs"
)

// ErrGone says that the VMM process has ended. Errors of VM methods wrap it where that is why.
var ErrGone = errors.New("the VM is gone")

// AgentPort is the port on which the agent accepts streams in every guest (see podvm/agent).
const AgentPort = 1024

// ReadyPort is the vsock port of the host that the agent dials, once, when it accepts streams, so
// that a driver whose channel is vsock need not try again and again while a guest boots.
const ReadyPort = 1025

// SerialAddress is where the guest finds a disk that is a block device.
func SerialAddress(serial string) string { return "serial:" + serial }

// CardMAC is the address of the network card that a VM has from the beginning, until its guest gives it
// another one.
const CardMAC = "02:ca:15:50:00:01"

// SerialMax is the longest disk serial, in bytes (virtio-blk's own limit).
const SerialMax = 20

// Driver starts VMs with one kind of VMM.
type Driver interface {
	// Launch starts a VM: a cold boot, or a clone where Config.Template is set. It returns when
	// the VMM process runs and its control socket answers; the guest may still be booting, and
	// the first Dial waits for it. On error nothing is left: no process, socket or cgroup. The
	// process is saved in Config.Dir (process.Save), so that it can be ended without a driver.
	Launch(ctx context.Context, c Config) (VM, error)
	// Attach finds the VM that a former daemon launched with the same Config. It returns ErrGone
	// if its process has ended (what it left in Config.Dir may then be deleted). The template of a
	// clone need not be there any more.
	Attach(ctx context.Context, c Config) (VM, error)
	// Name is the driver's name in configuration, metrics and records: "qemu", "cloud-hypervisor".
	Name() string
}

// Snapshotter is what a VM may be able to do besides: become a template.
type Snapshotter interface {
	// Snapshot pauses the VM and writes its device state to dir, so that a Launch with
	// Config.Template = dir makes copy-on-write clones of it. The VM must have been launched with
	// Config.MemoryFile inside dir and can only be killed afterwards.
	Snapshot(ctx context.Context, dir string) error
}

// Learner is what a driver may be able to do besides: have its clones begin with copies of the pages of
// their template's memory that they are going to write to, which takes less time than page by page.
type Learner interface {
	// Learn notes in the template of this clone which pages it has written to by now, for clones that are
	// launched later.
	Learn(v VM) error
	// Learned tells whether that was done for a template, by as many clones as it takes.
	Learned(template string) bool
}

// VM is one running virtual machine. Its methods may be called concurrently. All return an error
// that wraps ErrGone once the VMM has ended; none blocks past its context.
type VM interface {
	// Dial opens a new byte stream to a port in the guest. It waits, until ctx ends, for a guest
	// that is still booting; it fails at once, with the reason, when the VM ends or panics.
	// Half-close: the connection has CloseWrite.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// AddDisk hot-adds a disk and returns the address by which the agent finds it in the guest:
	// "serial:SERIAL" (a block device with that serial) or "pci:0000:00:06.0" (a pmem device).
	// The device may appear in the guest after AddDisk has returned. A serial in use is
	// errdefs.ErrAlreadyExists.
	AddDisk(ctx context.Context, d Disk) (addr string, err error)
	// RemoveDisk removes the disk and returns when the VMM has let go of its file. The guest must
	// have unmounted it. An unknown serial is errdefs.ErrNotFound.
	RemoveDisk(ctx context.Context, serial string) error
	// AddNIC hot-adds a network card backed by the tap. The VM has its own duplicate of the
	// descriptor when AddNIC returns; the caller closes its own.
	AddNIC(ctx context.Context, n NIC) error
	// Resize sets vCPUs and memory and returns what was reached. That is more than asked for where
	// the guest does not give memory or vCPUs back, or the VMM can't take them, and less where the
	// guest does not take what it is given, or where Config.Most is less; neither is an error. Values
	// beyond Config.Max, and less than one vCPU, are errdefs.ErrOutOfRange.
	Resize(ctx context.Context, s Size) (Size, error)
	// Info tells what the VM is now. It never blocks.
	Info() Info
	// Done is closed when the VMM has ended, for whatever reason; Info().Err then says which.
	Done() <-chan struct{}
	// Kill ends the VMM at once and returns when its process is gone and its sockets are removed.
	// It is idempotent. Its Config.Dir stays, with the console log in it.
	Kill(ctx context.Context) error
}

// Config describes a VM. It is persisted with the pod, so plain values only.
type Config struct {
	// ID names the VM in process titles and logs: the pod's id.
	ID string
	// Dir is an existing, empty directory of this VM alone, short enough for unix sockets in it
	// (at most 80 bytes). The driver keeps its sockets, pid file and console log there.
	Dir string
	// Kernel (an uncompressed PVH vmlinux) and Initrd are paths; Cmdline is added to what the
	// driver itself needs. Unused by a clone.
	Kernel, Initrd, Cmdline string
	// Size is what the VM starts with, Max what it can grow to.
	Size, Max Size
	// MemoryFile, where set, backs the guest's memory by this file (made by the driver), shared,
	// so that the VM can become a template. Without it memory is anonymous.
	MemoryFile string `json:",omitempty"`
	// Template, where set, is the directory of a snapshot: the VM is its copy-on-write clone.
	// Size and Max are those of the template.
	Template string `json:",omitempty"`
	// Disk, where set, is there from the beginning, neither ReadOnly nor Shared, at the address
	// SerialAddress(Disk.Serial). A template's clones have it too, each with a file of its own that
	// begins as a copy of the template's as it was at the snapshot.
	Disk *Disk `json:",omitempty"`
	// Tap, where set, backs a network card with the address CardMAC that is there from the beginning.
	// The VM has its own duplicate of the descriptor when Launch returns; the caller closes its own. A
	// template and its clones all have such a card, or none has.
	Tap *os.File `json:"-"`
	// Cgroup, where set, is the absolute path of an existing cgroup v2 directory into which the
	// VMM process is started.
	Cgroup string `json:",omitempty"`
}

// memoryBlock is what a guest's memory can grow by, in bytes: the blocks that Linux on x86 adds.
const memoryBlock = 128 << 20

// Most is the largest size that the VM can reach: Max, with memory in whole blocks.
func (c Config) Most() Size {
	return Size{CPUs: max(c.Max.CPUs, c.Size.CPUs), Memory: c.Size.Memory + c.Pluggable()}
}

// Pluggable is how much memory can be added, in bytes.
func (c Config) Pluggable() int64 {
	return max(c.Max.Memory-c.Size.Memory, 0) / memoryBlock * memoryBlock
}

// Size is what a VM has: vCPUs, and bytes of memory.
type Size struct {
	CPUs   int
	Memory int64
}

// Disk is a disk image on the host.
type Disk struct {
	// Serial names the disk in its VM: 1 to SerialMax bytes of [0-9a-zA-Z-].
	Serial string
	// Path is a raw image file or block device.
	Path string
	// ReadOnly disks may be attached to any number of VMs at once.
	ReadOnly bool
	// Shared asks that the pages of a ReadOnly disk be shared with other VMs (pmem with DAX) where
	// the VMM can; elsewhere it is a plain disk.
	Shared bool
}

// NIC is a network card whose frames go to and come from a tap device.
type NIC struct {
	MAC net.HardwareAddr
	Tap *os.File
	MTU int
}

// Info is what is known of a VM without asking it.
type Info struct {
	// PID of the VMM process.
	PID int
	// Size is the last one reached.
	Size Size
	// Err is why the VM ended: guest panic, VMM crash, killed. Nil while it runs. It includes the
	// last lines of the guest's console where they say more.
	Err error
}

// CheckSerial returns errdefs.ErrInvalidArgument for what can't be a disk's serial.
func CheckSerial(s string) error {
	if len(s) == 0 || len(s) > SerialMax {
		return fmt.Errorf("disk serial %q: want 1 to %d bytes: %w", s, SerialMax, errdefs.ErrInvalidArgument)
	}
	for _, r := range s {
		if r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') {
			return fmt.Errorf("disk serial %q: want only letters, digits and '-': %w", s, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
