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
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/caisson-vm/caisson/internal/atomicfile"
	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/state"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// probeLimit bounds the boot of a probe: one without hardware virtualization below KVM can hang. On
// a busy machine where KVM itself is nested in an emulation, a boot takes half a minute.
const (
	probeLimit    = 2 * time.Minute
	hopelessLimit = 20 * time.Second
)

// errHopeless is told of a probe that failed where hardly anything else could be expected. It is tried
// all the same, because there are KVMs that need neither.
var errHopeless = errors.New("the CPU offers neither VMX nor SVM")

// hopeless tells whether the CPU offers no virtualization.
func hopeless() bool {
	if runtime.GOARCH != "amd64" {
		return false
	}
	cpu, err := os.ReadFile("/proc/cpuinfo")
	flags := strings.Fields(string(cpu))
	return err == nil && !slices.Contains(flags, "vmx") && !slices.Contains(flags, "svm")
}

// result is a probe's, kept for as long as the machine runs, as far as nobody probes afresh.
type result struct{ Boot, Error string }

// probe says whether the program can really boot a guest with KVM: that /dev/kvm opens says nothing.
func probe(ctx context.Context, c Config, g guestimage.Files, d program, afresh bool) error {
	if _, err := os.Stat(device); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no %s: %s", device, mendDevice)
	}
	if err := os.MkdirAll(c.State, 0o700); err != nil {
		return err
	}
	key := strings.Join([]string{d.Name(), d.Binary(), d.Version(), g.Version}, " ")
	return remembered(filepath.Join(c.State, "probe.json"), key, afresh, func() error {
		start, limit := time.Now(), probeLimit
		if hopeless() {
			limit = hopelessLimit
		}
		limited, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		err := bootProbe(limited, c, g, d)
		if err != nil && ctx.Err() == nil && hopeless() {
			err = fmt.Errorf("%w: %w", errHopeless, err)
		}
		slog.Info("probed KVM with a guest", "driver", d.Name(), "works", err == nil, "ms", time.Since(start).Milliseconds())
		return err
	})
}

// remembered returns what find did when it was last called for the key since the machine started, or
// calls it. What counts is that a guest booted, or that there was no hope; a VMM that ended over it, or did not come
// so far, and a guest that took too long, may say something of the machine as it was just then.
func remembered(path, key string, afresh bool, find func() error) error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	known := map[string]result{}
	if data, err := os.ReadFile(path); err == nil {
		json.Unmarshal(data, &known) // what can't be read is found out again
	}
	if r, ok := known[key]; ok && r.Boot == string(boot) && !afresh {
		if r.Error != "" {
			return errors.New(r.Error)
		}
		return nil
	}
	r, found := result{Boot: string(boot)}, find()
	switch {
	case found == nil:
		known[key] = r
	case errors.Is(found, errHopeless):
		r.Error = found.Error()
		known[key] = r
	default:
		delete(known, key)
	}
	data, err := json.Marshal(known)
	if err != nil {
		return err
	}
	return errors.Join(found, atomicfile.Write(path, data, 0o600))
}

// probePrefix begins the names of folders in which probes run.
const probePrefix = "probe-"

func bootProbe(ctx context.Context, c Config, g guestimage.Files, d vmm.Driver) error {
	dir, err := os.MkdirTemp(c.State, probePrefix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	lock, err := state.Acquire(dir, "state")
	if err != nil {
		return err
	}
	defer lock.Release()
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

// sweepProbes takes back probes whose process was killed. One that still runs, of caissond check, holds
// the lock of its folder.
func sweepProbes(ctx context.Context, dir string) error {
	left, err := filepath.Glob(filepath.Join(dir, probePrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range left {
		lock, err := state.Acquire(dir, "state")
		if err != nil {
			continue
		}
		err = errors.Join(process.KillIn(ctx, dir), os.RemoveAll(dir), lock.Release())
		if err != nil {
			return fmt.Errorf("take back a probe: %w", err)
		}
		slog.Info("half-made probe taken back", "path", dir)
	}
	return nil
}
