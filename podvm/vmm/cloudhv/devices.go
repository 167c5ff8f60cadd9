package cloudhv

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/machine"
)

// Device ids begin with what the device is.
const (
	pmemID = "pmem-"
	nicID  = "nic-"
	// cardID is the network card that is there from the beginning.
	cardID = nicID + "0"
)

// pmemBlock is what the size of a pmem device must be a multiple of, in bytes.
const pmemBlock = 2 << 20

type pciDevice struct {
	ID  string `json:"id"`
	BDF string `json:"bdf"`
}

// AddDisk implements vmm.VM. A shared disk becomes a pmem device where its size allows.
func (v *vm) AddDisk(ctx context.Context, d vmm.Disk) (string, error) {
	if err := vmm.CheckSerial(d.Serial); err != nil {
		return "", err
	}
	info, err := os.Stat(d.Path)
	if err != nil {
		return "", fmt.Errorf("add disk %s: %w", d.Serial, err)
	}
	pmem := d.Shared && d.ReadOnly && info.Mode().IsRegular() && info.Size() > 0 && info.Size()%pmemBlock == 0
	id := machine.DiskID(d.Serial)
	if pmem {
		id = pmemID + d.Serial
	}
	if !v.Claim(d.Serial, id) {
		return "", fmt.Errorf("add disk %s: %w", d.Serial, errdefs.ErrAlreadyExists)
	}
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	var added pciDevice
	if pmem {
		err = v.api.put(ctx, "vm.add-pmem", pmemConfig{id, d.Path, true}, &added)
	} else {
		err = v.api.put(ctx, "vm.add-disk", disk(d), &added)
	}
	if err != nil {
		v.Release(d.Serial)
		return "", fmt.Errorf("add disk %s: %w", d.Serial, v.Explain(err))
	}
	if pmem {
		return "pci:" + added.BDF, nil
	}
	return vmm.SerialAddress(d.Serial), nil
}

// RemoveDisk implements vmm.VM. The guest acknowledges the removal, and an event then says that
// the device is gone.
func (v *vm) RemoveDisk(ctx context.Context, serial string) error {
	id, ok := v.Device(serial)
	if !ok {
		return fmt.Errorf("remove disk %s: %w", serial, v.Explain(errdefs.ErrNotFound))
	}
	if err := v.remove(ctx, id); err != nil {
		return fmt.Errorf("remove disk %s: %w", serial, v.Explain(err))
	}
	v.Release(serial)
	return nil
}

func (v *vm) remove(ctx context.Context, id string) error {
	gone := v.Leaving(id)
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	if err := v.api.put(ctx, "vm.remove-device", map[string]string{"id": id}, nil); err != nil {
		return err
	}
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the guest has not let go of it: %w", context.Cause(ctx))
	}
}

// AddNIC implements vmm.VM. The descriptor travels beside the request.
func (v *vm) AddNIC(ctx context.Context, n vmm.NIC) error {
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	id := nicID + strings.ReplaceAll(n.MAC.String(), ":", "")
	if err := v.api.putFile(ctx, "vm.add-net", netConfig{id, n.MAC.String()}, n.Tap); err != nil {
		return fmt.Errorf("add network card %s: %w", n.MAC, v.Explain(err))
	}
	return nil
}

// vmInfo is the part of vm.info that is in use.
type vmInfo struct {
	Config struct {
		CPUs  cpusConfig   `json:"cpus"`
		Disks []diskConfig `json:"disks"`
		Pmem  []pmemConfig `json:"pmem"`
	} `json:"config"`
	// MemoryActual is the memory that the guest has: what it was booted with and what it plugged.
	MemoryActual int64 `json:"memory_actual_size"`
}

// refresh asks the VMM what it has.
func (v *vm) refresh(ctx context.Context) error {
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	var i vmInfo
	if err := v.api.call(ctx, http.MethodGet, "vm.info", nil, &i); err != nil {
		return err
	}
	v.SetSize(func(s *vmm.Size) { *s = vmm.Size{CPUs: i.Config.CPUs.Boot, Memory: i.MemoryActual} })
	for _, d := range i.Config.Disks {
		if serial, ok := strings.CutPrefix(d.ID, machine.DiskID("")); ok {
			v.Claim(serial, d.ID)
		}
	}
	for _, d := range i.Config.Pmem {
		if serial, ok := strings.CutPrefix(d.ID, pmemID); ok {
			v.Claim(serial, d.ID)
		}
	}
	return nil
}

// The guest plugs and unplugs memory at its own pace, and Cloud Hypervisor has no event for it.
const (
	resizeStep  = 20 * time.Millisecond
	resizeStall = 5 * time.Second // no progress for so long: it has reached what it can
)

// Resize implements vmm.VM. It takes no vCPU away: Cloud Hypervisor 54 ignores the guest's ejection of
// one, so that the guest is without it for ever while it counts as there, and takes no other number.
// Source: PUT /vm.resize, /vm.resize-zone and vmm/src/cpu.rs of Cloud Hypervisor.
func (v *vm) Resize(ctx context.Context, s vmm.Size) (vmm.Size, error) {
	if s.CPUs < 1 || s.CPUs > v.Config.Max.CPUs || s.Memory > v.Config.Max.Memory {
		return v.Info().Size, fmt.Errorf("resize to %d vCPUs, %d bytes: at most %d, %d: %w", s.CPUs, s.Memory, v.Config.Max.CPUs, v.Config.Max.Memory, errdefs.ErrOutOfRange)
	}
	v.resize.Lock()
	defer v.resize.Unlock()
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	if v.late {
		if err := v.refresh(ctx); err != nil {
			return v.Info().Size, fmt.Errorf("resize: %w", v.Explain(err))
		}
	}
	now := v.Info().Size
	memory := v.plan(s.Memory)
	if s.CPUs > now.CPUs {
		if err := v.api.put(ctx, "vm.resize", map[string]int{"desired_vcpus": s.CPUs}, nil); err != nil {
			return v.Info().Size, fmt.Errorf("resize: %w", v.Explain(err))
		}
	}
	if memory != now.Memory {
		if err := v.api.put(ctx, "vm.resize-zone", map[string]any{"id": zone, "desired_ram": memory}, nil); err != nil {
			return v.Info().Size, fmt.Errorf("resize: %w", v.Explain(err))
		}
	}
	if err := v.settle(ctx, memory); err != nil {
		return v.Info().Size, fmt.Errorf("resize: %w", v.Explain(err))
	}
	return v.Info().Size, nil
}

// plan is the memory to ask for: what the VM was booted with can't be unplugged, and the rest comes
// in blocks.
func (v *vm) plan(memory int64) int64 {
	base, most := v.Config.Size.Memory, v.Config.Pluggable()
	blocks := (max(memory-base, 0) + memoryBlock - 1) / memoryBlock
	return base + min(blocks*memoryBlock, most)
}

// settle waits until the guest has the memory, or makes no more progress towards it.
func (v *vm) settle(ctx context.Context, memory int64) error {
	last, since := int64(-1), time.Now()
	for {
		if err := v.refresh(ctx); err != nil {
			return err
		}
		now := v.Info().Size.Memory
		if now == memory || now == last && time.Since(since) > resizeStall {
			v.late = now != memory
			return nil
		}
		if now != last {
			last, since = now, time.Now()
		}
		select {
		case <-time.After(resizeStep):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
