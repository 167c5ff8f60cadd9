package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/caisson-vm/caisson/internal/atomicfile"
	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/cloudhv"
	"github.com/caisson-vm/caisson/podvm/vmm/qemu"
)

// choice is the driver for new pods, why it was taken, and all that can attach to old ones.
type choice struct {
	driver  vmm.Driver
	version string
	reason  string
	all     map[string]vmm.Driver
}

// chooseDriver takes the configured driver, or the best that works here: Cloud Hypervisor with KVM,
// QEMU with KVM, QEMU by emulation.
func chooseDriver(ctx context.Context, c Config, g guestimage.Files) (choice, error) {
	found := choice{all: map[string]vmm.Driver{}}
	use := func(d vmm.Driver, version, reason string) (choice, error) {
		found.driver, found.version, found.reason = d, version, reason
		return found, nil
	}
	hv, hvErr := cloudhv.New(ctx, c.VM.CloudHV)
	if hvErr == nil {
		found.all[hv.Name()] = hv
		if c.Driver == "auto" {
			hvErr = probe(ctx, c, g, hv, hv.Version())
		}
	}
	takeHV := hvErr == nil && c.Driver != qemu.Name
	accel, kvmErr := qemu.TCG, error(nil)
	if !takeHV {
		if kvmErr = probeQEMU(ctx, c, g); kvmErr == nil {
			accel = qemu.KVM
		}
	}
	q, qErr := qemu.New(ctx, c.VM.QEMU, accel)
	if qErr == nil {
		found.all[q.Name()] = q
	}
	because := "it is configured"
	if c.Driver == "auto" {
		because = "it and KVM work"
	}
	switch {
	case takeHV:
		return use(hv, hv.Version(), because)
	case c.Driver == cloudhv.Name:
		return found, hvErr
	case qErr != nil:
		return found, fmt.Errorf("no VMM works: %w", errors.Join(hvErr, qErr))
	case kvmErr == nil && c.Driver == "auto":
		return use(q, q.Version(), fmt.Sprintf("KVM works, Cloud Hypervisor does not: %v", oneLine(hvErr)))
	case kvmErr == nil:
		return use(q, q.Version(), because)
	}
	return use(q, q.Version(), fmt.Sprintf("by emulation, because KVM does not work: %v", oneLine(kvmErr)))
}

func oneLine(err error) string {
	text, _, _ := strings.Cut(err.Error(), "; the guest's console ends")
	return strings.ReplaceAll(text, "\n", "; ")
}

func probeQEMU(ctx context.Context, c Config, g guestimage.Files) error {
	q, err := qemu.New(ctx, c.VM.QEMU, qemu.KVM)
	if err != nil {
		return err
	}
	return probe(ctx, c, g, q, q.Version())
}

// probeLimit bounds the boot of a probe: one without hardware virtualization below KVM can hang. On
// a busy machine where KVM itself is nested in an emulation, a boot takes half a minute.
const probeLimit = 2 * time.Minute

// result is a probe's, kept for as long as the machine runs.
type result struct{ Boot, Error string }

// probe says whether the driver can really boot a guest with KVM: that /dev/kvm opens says nothing.
// The answer is kept per boot, version and guest.
func probe(ctx context.Context, c Config, g guestimage.Files, d vmm.Driver, version string) error {
	if _, err := os.Stat("/dev/kvm"); errors.Is(err, fs.ErrNotExist) {
		return errors.New("there is no /dev/kvm: enable virtualization in the firmware, and load kvm_intel or kvm_amd")
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(c.State, 0o700); err != nil {
		return err
	}
	path := filepath.Join(c.State, "probe.json")
	key := strings.Join([]string{d.Name(), version, g.Version}, " ")
	known := map[string]result{}
	if data, err := os.ReadFile(path); err == nil {
		json.Unmarshal(data, &known) // what can't be read is found out again
	}
	r, ok := known[key]
	if !ok || r.Boot != string(boot) {
		start := time.Now()
		r = result{Boot: string(boot)}
		if err := bootProbe(ctx, c, g, d); err != nil {
			if ctx.Err() != nil {
				return err
			}
			r.Error = err.Error()
		}
		slog.Info("probed KVM with a guest", "driver", d.Name(), "works", r.Error == "", "ms", time.Since(start).Milliseconds())
		known[key] = r
		if data, err := json.Marshal(known); err == nil {
			err = atomicfile.Write(path, data, 0o600)
			if err != nil {
				return err
			}
		}
	}
	if r.Error != "" {
		return errors.New(r.Error)
	}
	return nil
}

func bootProbe(ctx context.Context, c Config, g guestimage.Files, d vmm.Driver) error {
	dir, err := os.MkdirTemp(c.State, "probe")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	size := vmm.Size{CPUs: 1, Memory: 256 << 20}
	v, err := d.Launch(ctx, vmm.Config{ID: "probe", Dir: dir, Kernel: g.Kernel, Initrd: g.Initrd, Cmdline: g.Cmdline, Size: size, Max: size})
	if err != nil {
		return err
	}
	conn, err := v.Dial(ctx, vmm.AgentPort)
	if err == nil {
		conn.Close()
	}
	return errors.Join(err, v.Kill(context.WithoutCancel(ctx)))
}
