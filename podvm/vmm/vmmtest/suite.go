// Package vmmtest has the contract that every VM driver passes (Run), and what tests of drivers and
// of their users share.
//
// Run needs real guests. Fake, whose VMs have none, passes only what a driver promises about its
// host's side, which is the part of the contract in host.go.
package vmmtest

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// Limits of steps, long enough for a guest that is emulated on a busy machine.
const (
	bootLimit = 3 * time.Minute
	callLimit = 2 * time.Minute
	// endLimit is for what is promised to be seen at once.
	endLimit = 10 * time.Second
)

const mib = 1 << 20

var (
	startSize = vmm.Size{CPUs: 1, Memory: 256 * mib}
	maxSize   = vmm.Size{CPUs: 2, Memory: 768 * mib}
)

// Run proves that a driver keeps the contract of package vmm, with real guests. newDriver makes a
// driver that knows nothing of the others', as a daemon's is after a restart. The package's TestMain
// must be Main. It takes a minute where guests are emulated.
//
// A memory file with other content than it had when the snapshot was made is not the driver's to
// find: package template compares digests.
func Run(t *testing.T, newDriver func(t *testing.T) vmm.Driver, g guestimage.Files) {
	if Owner() {
		own(t, newDriver(t))
		return
	}
	s := &suite{newDriver: newDriver, guest: g, dir: t.TempDir()}
	s.image = filepath.Join(s.dir, "image")
	makeImage(t, s.image)
	t.Run("Attach", s.attach)
	t.Run("NoAnswer", s.noAnswer)
	t.Run("NoKernel", s.noKernel)
	t.Run("Template", s.template)
}

type suite struct {
	newDriver  func(t *testing.T) vmm.Driver
	guest      guestimage.Files
	dir, image string
}

// config is that of a cold boot, with a folder of its own.
func (s *suite) config(t *testing.T, id string) vmm.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm-") // not the test's: that one's path is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			logs(t, dir)
		}
		os.RemoveAll(dir)
	})
	return vmm.Config{ID: id, Dir: dir, Kernel: s.guest.Kernel, Initrd: s.guest.Initrd, Cmdline: s.guest.Cmdline, Size: startSize, Max: maxSize}
}

// logs shows what a VM and its VMM said.
func logs(t *testing.T, dir string) {
	found, _ := filepath.Glob(filepath.Join(dir, "*.log"))
	for _, path := range found {
		if text, err := os.ReadFile(path); err == nil && len(text) > 0 {
			t.Logf("%s: %s", path, text)
		}
	}
}

// launch starts a VM that ends with the test.
func launch(t *testing.T, d vmm.Driver, c vmm.Config) vmm.VM {
	t.Helper()
	v, err := d.Launch(limited(t, bootLimit), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return v
}

// inside returns the guest of a VM, whose connections end with the test.
func inside(t *testing.T, v vmm.VM) *guest {
	t.Helper()
	g := newGuest(v)
	t.Cleanup(func() { g.close() })
	return g
}

func limited(t *testing.T, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// eventually tries until it works, for at most callLimit.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	for end := time.Now().Add(callLimit); ; time.Sleep(50 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}
