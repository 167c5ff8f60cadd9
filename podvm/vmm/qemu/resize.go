package qemu

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/machine"
)

// The guest plugs and unplugs memory at its own pace.
const (
	resizeStep  = 20 * time.Millisecond
	resizeStall = 5 * time.Second // no progress for so long: it has reached what it can
	// cpuStall is how long it may take to let a vCPU go: it first moves what runs there.
	cpuStall = 15 * time.Second
)

// Resize implements vmm.VM.
// Source: QMP qom-set requested-size of virtio-mem, device_add and device_del of vCPUs.
func (v *vm) Resize(ctx context.Context, s vmm.Size) (vmm.Size, error) {
	most := v.shape.Max
	if s.CPUs < 1 || s.CPUs > most.CPUs || s.Memory > most.Memory {
		return v.Info().Size, fmt.Errorf("resize to %d vCPUs, %d bytes: at most %d, %d: %w", s.CPUs, s.Memory, most.CPUs, most.Memory, errdefs.ErrOutOfRange)
	}
	v.resize.Lock()
	defer v.resize.Unlock()
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	err := v.setCPUs(ctx, s.CPUs)
	if err == nil {
		err = v.setMemory(ctx, s.Memory)
	}
	if err != nil {
		return v.Info().Size, fmt.Errorf("resize: %w", v.Explain(err))
	}
	return v.Info().Size, nil
}

// slot is a place for a vCPU, as query-hotpluggable-cpus tells it.
type slot struct {
	Type  string `json:"type"`
	Props object `json:"props"`
	Path  string `json:"qom-path"` // empty: free
}

func (v *vm) setCPUs(ctx context.Context, n int) error {
	for {
		var slots []slot
		if err := v.control.execute(ctx, "query-hotpluggable-cpus", nil, &slots); err != nil {
			return err
		}
		var free, used []slot
		for _, s := range slots {
			if s.Path == "" {
				free = append(free, s)
			} else {
				used = append(used, s)
			}
		}
		v.SetSize(func(s *vmm.Size) { s.CPUs = len(used) })
		switch {
		case len(used) < n && len(free) > 0:
			// They are listed from the last to the first, and the guest wants them in order.
			s := free[len(free)-1]
			device := object{"driver": s.Type, "id": fmt.Sprint(cpuID, len(used))}
			for key, value := range s.Props {
				device[key] = value
			}
			if err := v.control.execute(ctx, "device_add", device, nil); err != nil {
				return err
			}
		case len(used) > max(n, v.shape.Size.CPUs) && v.canUnplugCPUs():
			gone, err := v.unplugCPU(ctx, fmt.Sprint(cpuID, len(used)-1))
			if err != nil || !gone {
				return err
			}
		default:
			return nil // reached, or as near as those that it was booted with allow
		}
	}
}

// canUnplugCPUs is false under emulation: QEMU waits for the thread that it is in, or, where each vCPU
// has its own, corrupts its memory when one is plugged in again.
func (v *vm) canUnplugCPUs() bool { return v.shape.Accel == KVM }

// unplugCPU takes a vCPU from the guest, unless the guest keeps it.
func (v *vm) unplugCPU(ctx context.Context, id string) (gone bool, err error) {
	limited, cancel := context.WithTimeout(ctx, cpuStall)
	defer cancel()
	err = v.unplug(limited, id)
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		return false, nil
	}
	return err == nil, err
}

func (v *vm) setMemory(ctx context.Context, memory int64) error {
	hot := v.shape.hotplug()
	if hot == 0 {
		return nil
	}
	want := (max(memory-v.shape.Size.Memory, 0) + memoryBlock - 1) / memoryBlock * memoryBlock
	want = min(want, hot)
	path := "/machine/peripheral/" + pluggable
	if err := v.control.execute(ctx, "qom-set", object{"path": path, "property": "requested-size", "value": want}, nil); err != nil {
		return err
	}
	last, since := int64(-1), time.Now()
	for {
		now, err := v.plugged(ctx)
		if err != nil {
			return err
		}
		if now == want || now == last && time.Since(since) > resizeStall {
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

// plugged asks how much memory the guest has plugged, in bytes.
func (v *vm) plugged(ctx context.Context) (int64, error) {
	var size int64
	if err := v.control.execute(ctx, "qom-get", object{"path": "/machine/peripheral/" + pluggable, "property": "size"}, &size); err != nil {
		return 0, err
	}
	v.SetSize(func(s *vmm.Size) { s.Memory = v.shape.Size.Memory + size })
	return size, nil
}

// refresh asks QEMU what the VM has, after another daemon's death.
func (v *vm) refresh(ctx context.Context) error {
	var devices []struct {
		Name string `json:"name"`
	}
	if err := v.execute(ctx, "qom-list", object{"path": "/machine/peripheral"}, &devices); err != nil {
		return err
	}
	for _, d := range devices {
		if serial, ok := strings.CutPrefix(d.Name, machine.DiskID("")); ok {
			v.Claim(serial, d.Name)
		}
	}
	var slots []slot
	if err := v.execute(ctx, "query-hotpluggable-cpus", nil, &slots); err != nil {
		return err
	}
	used := 0
	for _, s := range slots {
		if s.Path != "" {
			used++
		}
	}
	v.SetSize(func(s *vmm.Size) { s.CPUs = used })
	if v.shape.hotplug() == 0 {
		return nil
	}
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	_, err := v.plugged(ctx)
	return err
}
