// Package qemu runs VMs with QEMU: QMP for control, one virtio-serial port that carries all
// streams, virtio-mem, and migration to a file for templates. With KVM where that truly works, by
// emulation elsewhere, so that the real thing runs on any machine.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/internal/undo"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/machine"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
	"github.com/caisson-vm/caisson/podvm/vmm/tail"
)

// Name is the driver's name.
const Name = "qemu"

// Accel is how QEMU runs the guest's instructions.
type Accel string

// The accelerators.
const (
	KVM Accel = "kvm"
	TCG Accel = "tcg" // emulation
)

// Driver starts VMs with one QEMU binary.
type Driver struct {
	binary, version string
	accel           Accel
	broken          error // why no VM can be launched
}

// New looks the binary up (in PATH, when it is a name). The error is errdefs.ErrNotFound when there
// is none.
func New(ctx context.Context, binary string, accel Accel) (*Driver, error) {
	path, err := exec.LookPath(binary)
	if err != nil {
		return nil, fmt.Errorf("qemu: no %q; install Debian's qemu-system-x86, or name the binary in the key vm.qemu: %w", binary, errdefs.ErrNotFound)
	}
	out, err := exec.CommandContext(ctx, path, "--version").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s --version: %w: %s", path, err, out)
	}
	match := versionPattern.FindString(string(out))
	if match == "" {
		return nil, fmt.Errorf("%s --version: %q has no version: %w", path, out, errdefs.ErrFailedPrecondition)
	}
	return &Driver{binary: path, version: match, accel: accel}, nil
}

// AttachOnly is the driver where New has failed: it attaches, which takes no binary, to VMs that were
// launched before that was so. Launch says why it can't.
func AttachOnly(why error) *Driver { return &Driver{broken: why} }

var versionPattern = regexp.MustCompile(`\d+\.\d+\.\d+.*`)

// Name implements vmm.Driver.
func (d *Driver) Name() string { return Name }

// Version is QEMU's and the accelerator, which a template depends on.
func (d *Driver) Version() string { return d.version + " " + string(d.accel) }

// Binary is the path of the program.
func (d *Driver) Binary() string { return d.binary }

// MaxCPUs is how many vCPUs a VM can have at most.
// Source: query-machines of QEMU 7.2, cpu-max of the machine pc (see args).
func (d *Driver) MaxCPUs() int { return 255 }

// KVM tells whether the VMs run by KVM, or by emulation.
func (d *Driver) KVM() bool { return d.accel == KVM }

// Launch implements vmm.Driver.
func (d *Driver) Launch(ctx context.Context, c vmm.Config) (vmm.VM, error) {
	if d.broken != nil {
		return nil, d.broken
	}
	var u undo.Stack
	defer u.Run()
	u.Push("remove VMM files", func(context.Context) error { return removeFiles(c.Dir) })
	l, err := tail.OpenPair(c.Dir)
	if err != nil {
		return nil, err
	}
	u.Push("close logs", func(context.Context) error { return l.Close() })
	shape, err := d.shape(c)
	if err == nil {
		err = shape.checkMemory(c)
	}
	if err == nil {
		err = shape.write(c.Dir) // which outlives the template, and the choice of accelerator
	}
	if err != nil {
		return nil, err
	}
	p, err := d.start(c, shape, l)
	if err != nil {
		return nil, err
	}
	u.Push("kill VMM", p.Kill)
	v := newVM(c, shape, p, l)
	if err := v.connect(ctx); err != nil {
		return nil, v.Explain(err)
	}
	if c.Template != "" {
		if err := v.restore(ctx); err != nil {
			return nil, v.Explain(err)
		}
	}
	u.Release()
	go v.watch()
	return v, nil
}

// start runs the process. Its sockets listen before it does, so that nobody waits for them.
func (d *Driver) start(c vmm.Config, s shape, l tail.Pair) (*process.Process, error) {
	control, err := machine.Listen(qmpPath(c.Dir))
	if err != nil {
		return nil, err
	}
	defer control.Close()
	channel, err := machine.Listen(channelPath(c.Dir))
	if err != nil {
		return nil, err
	}
	defer channel.Close()
	log, err := l.VMM.Writer()
	if err != nil {
		return nil, err
	}
	defer log.Close()
	files := []*os.File{control, channel}
	if c.Tap != nil {
		files = append(files, c.Tap)
	}
	p, err := process.Start(process.Spec{
		Path: d.binary, Dir: c.Dir, Log: log, Files: files, Cgroup: c.Cgroup,
		Args: s.args(c),
	})
	if err != nil {
		return nil, err
	}
	if err := p.Save(c.Dir); err != nil {
		return nil, errors.Join(err, p.Kill(context.WithoutCancel(context.Background())))
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
	l, err := tail.OpenPair(c.Dir)
	if err != nil {
		return nil, err
	}
	shape, err := readShape(c.Dir)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("attach %s: %w", c.ID, err), l.Close())
	}
	v := newVM(c, shape, p, l)
	v.again = true
	if err := v.connect(ctx); err != nil {
		return nil, errors.Join(v.Explain(err), l.Close())
	}
	if err := v.refresh(ctx); err != nil {
		v.control.close()
		return nil, errors.Join(v.Explain(err), l.Close())
	}
	go v.watch()
	return v, nil
}

// shape is what of a VM must be the same in a template and its clones.
type shape struct {
	Accel  Accel    `json:"accel"`
	Size   vmm.Size `json:"size"`
	Max    vmm.Size `json:"max"`
	Memory string   `json:"memory"` // name of the template's memory file
}

const shapeName = "qemu.json"

// shape of a clone is read from its template.
func (d *Driver) shape(c vmm.Config) (shape, error) {
	if c.Template == "" {
		return shape{Accel: d.accel, Size: c.Size, Max: c.Max, Memory: filepath.Base(c.MemoryFile)}, nil
	}
	s, err := readShape(c.Template)
	if err == nil && (s.Memory == "" || strings.Contains(s.Memory, "/")) {
		err = fmt.Errorf("memory file %q", s.Memory)
	}
	if err != nil {
		return s, fmt.Errorf("clone of %s: %w", c.Template, err)
	}
	return s, nil
}

func readShape(dir string) (s shape, err error) {
	data, err := os.ReadFile(filepath.Join(dir, shapeName))
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	return s, err
}

func (s shape) write(dir string) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, shapeName), data, 0o600)
}

// checkMemory sees that a clone's template has its memory: QEMU would make a file that is missing.
func (s shape) checkMemory(c vmm.Config) error {
	if c.Template == "" {
		return nil
	}
	memory, err := os.Stat(filepath.Join(c.Template, s.Memory))
	if err != nil {
		return fmt.Errorf("clone of %s: %w", c.Template, err)
	}
	if memory.Size() != s.Size.Memory {
		return fmt.Errorf("clone of %s: the memory file has %d bytes, want %d: %w", c.Template, memory.Size(), s.Size.Memory, errdefs.ErrDataLoss)
	}
	return nil
}

// removeFiles removes what the driver made in the VM's folder, but for its logs.
func removeFiles(dir string) error {
	return errors.Join(os.RemoveAll(qmpPath(dir)), os.RemoveAll(channelPath(dir)), os.RemoveAll(process.SavedPath(dir)), os.RemoveAll(filepath.Join(dir, shapeName)),
		os.RemoveAll(tail.PipePath(tail.ConsolePath(dir))), os.RemoveAll(tail.PipePath(tail.VMMPath(dir))))
}

func qmpPath(dir string) string     { return filepath.Join(dir, "qmp.sock") }
func channelPath(dir string) string { return filepath.Join(dir, "agent.sock") }
