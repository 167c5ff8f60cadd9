package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/machine"
)

// Device ids begin with what the device is; the block node behind a disk has the id of the disk
// and this ending.
const (
	nicID   = "nic-"
	cardID  = nicID + "0" // the network card that is there from the beginning
	cpuID   = "cpu-"
	backing = "-file"
)

// args of a command.
type object map[string]any

// String is JSON, which QEMU's command line takes too.
func (o object) String() string {
	data, err := json.Marshal(o)
	if err != nil {
		panic(err) // unreachable: strings and booleans
	}
	return string(data)
}

// AddDisk implements vmm.VM.
func (v *vm) AddDisk(ctx context.Context, d vmm.Disk) (string, error) {
	if err := vmm.CheckSerial(d.Serial); err != nil {
		return "", err
	}
	if !v.Claim(d.Serial, machine.DiskID(d.Serial)) {
		return "", fmt.Errorf("add disk %s: %w", d.Serial, errdefs.ErrAlreadyExists)
	}
	if err := v.addDisk(ctx, d); err != nil {
		v.Release(d.Serial)
		return "", fmt.Errorf("add disk %s: %w", d.Serial, v.Explain(err))
	}
	return vmm.SerialAddress(d.Serial), nil
}

func (v *vm) addDisk(ctx context.Context, d vmm.Disk) error {
	id := machine.DiskID(d.Serial)
	if err := v.execute(ctx, "blockdev-add", blockdev(d), nil); err != nil {
		return err
	}
	err := v.execute(ctx, "device_add", blkdev(d), nil)
	if err != nil {
		err = errors.Join(err, v.execute(context.WithoutCancel(ctx), "blockdev-del", object{"node-name": id + backing}, nil))
	}
	return err
}

// blockdev is the block node behind a disk. Source: qapi/block-core.json of QEMU.
func blockdev(d vmm.Disk) object {
	file := object{"driver": "file", "filename": d.Path, "discard": "unmap"}
	if strings.HasPrefix(d.Path, "/dev/") {
		file["driver"] = "host_device"
	}
	return object{
		"driver": "raw", "node-name": machine.DiskID(d.Serial) + backing, "read-only": d.ReadOnly, "discard": "unmap", "file": file,
	}
}

// blkdev is the guest's device for a disk. What goes wrong with the file is the guest's to handle: QEMU
// would stop all of it when the host's disk is full, and may hang itself.
func blkdev(d vmm.Disk) object {
	id := machine.DiskID(d.Serial)
	return object{"driver": "virtio-blk-pci", "id": id, "drive": id + backing, "serial": d.Serial, "werror": "report", "rerror": "report"}
}

// RemoveDisk implements vmm.VM. The guest acknowledges the removal, then the file is closed.
func (v *vm) RemoveDisk(ctx context.Context, serial string) error {
	id, ok := v.Device(serial)
	if !ok {
		return fmt.Errorf("remove disk %s: %w", serial, v.Explain(errdefs.ErrNotFound))
	}
	err := v.unplug(ctx, id)
	if err == nil {
		err = v.execute(ctx, "blockdev-del", object{"node-name": id + backing}, nil)
	}
	if err != nil {
		return fmt.Errorf("remove disk %s: %w", serial, v.Explain(err))
	}
	v.Release(serial)
	return nil
}

// unplug asks the guest to let a device go and waits until it is gone. A guest that is just
// finding the device may miss the question, so it is asked again.
func (v *vm) unplug(ctx context.Context, id string) error {
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	gone := v.Leaving(id)
	const again = 5 * time.Second
	for {
		err := v.control.execute(ctx, "device_del", object{"id": id}, nil)
		if errors.Is(err, errdefs.ErrNotFound) {
			return nil // it went before the second question
		}
		if err != nil && !strings.Contains(err.Error(), "unplug") { // "already in the process of unplug"
			return err
		}
		select {
		case <-gone:
			return nil
		case <-time.After(again):
		case <-ctx.Done():
			return fmt.Errorf("the guest has not let go of it: %w", context.Cause(ctx))
		}
	}
}

// AddNIC implements vmm.VM. The descriptor travels beside the command.
func (v *vm) AddNIC(ctx context.Context, n vmm.NIC) error {
	ctx, cancel := v.UntilEnd(ctx)
	defer cancel()
	if err := v.addNIC(ctx, n); err != nil {
		return fmt.Errorf("add network card %s: %w", n.MAC, v.Explain(err))
	}
	return nil
}

func (v *vm) addNIC(ctx context.Context, n vmm.NIC) error {
	id := nicID + strings.ReplaceAll(n.MAC.String(), ":", "")
	if err := v.control.executeWith(ctx, "getfd", object{"fdname": id}, nil, n.Tap); err != nil {
		return err
	}
	if err := v.control.execute(ctx, "netdev_add", object{"type": "tap", "id": id + backing, "fd": id, "vhost": false}, nil); err != nil {
		return errors.Join(err, v.control.execute(context.WithoutCancel(ctx), "closefd", object{"fdname": id}, nil))
	}
	device := object{"driver": "virtio-net-pci", "id": id, "netdev": id + backing, "mac": n.MAC.String(), "romfile": ""}
	if n.MTU > 0 {
		device["host_mtu"] = n.MTU
	}
	err := v.control.execute(ctx, "device_add", device, nil)
	if err != nil {
		err = errors.Join(err, v.control.execute(context.WithoutCancel(ctx), "netdev_del", object{"id": id + backing}, nil))
	}
	return err
}
