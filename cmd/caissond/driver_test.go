package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/cloudhv"
	"github.com/caisson-vm/caisson/podvm/vmm/qemu"
	"github.com/caisson-vm/caisson/podvm/vmm/vmmtest"
)

// script writes an executable.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vmm")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

const missing = "/no/such/vmm"

// TestChooseDriver has VMMs that are missing, too old, or end when they are to boot a guest with KVM, as
// they do where /dev/kvm opens and does not work. Whatever is chosen, both attach.
func TestChooseDriver(t *testing.T) {
	old := script(t, "echo cloud-hypervisor v50.2.0")
	ends := script(t, "echo cloud-hypervisor v54.0.0")
	// By emulation it would work.
	noKVM := script(t, `case "$*" in *-version*) echo QEMU emulator version 7.2.22;; *) echo KVM: no >&2; exit 1;; esac`)
	for name, c := range map[string]struct {
		driver, hv, qemu string
		want, says       string
		err              string
	}{
		"auto, both end":                 {"auto", ends, noKVM, "qemu 7.2.22 tcg", "by emulation", ""},
		"auto, Cloud Hypervisor missing": {"auto", missing, noKVM, "qemu 7.2.22 tcg", "by emulation", ""},
		"auto, Cloud Hypervisor too old": {"auto", old, noKVM, "qemu 7.2.22 tcg", "by emulation", ""},
		"auto, QEMU missing":             {"auto", ends, missing, "", "", "vm.qemu"},
		"auto, both missing":             {"auto", missing, missing, "", "", "vm.cloud_hypervisor"},
		"Cloud Hypervisor":               {"cloud-hypervisor", ends, noKVM, "cloud-hypervisor v54.0.0", "configured", ""},
		"Cloud Hypervisor, QEMU missing": {"cloud-hypervisor", ends, missing, "cloud-hypervisor v54.0.0", "configured", ""},
		"Cloud Hypervisor, missing":      {"cloud-hypervisor", missing, noKVM, "", "", "vm.cloud_hypervisor"},
		"Cloud Hypervisor, too old":      {"cloud-hypervisor", old, noKVM, "", "", "install 51"},
		"QEMU":                           {"qemu", ends, noKVM, "qemu 7.2.22 tcg", "by emulation", ""},
		"QEMU, Cloud Hypervisor missing": {"qemu", missing, noKVM, "qemu 7.2.22 tcg", "by emulation", ""},
		"QEMU, missing":                  {"qemu", ends, missing, "", "", "vm.qemu"},
	} {
		t.Run(name, func(t *testing.T) {
			config := Config{Driver: c.driver, State: t.TempDir()}
			config.VM.CloudHV, config.VM.QEMU = c.hv, c.qemu
			found, err := chooseDriver(t.Context(), config, guestimage.Files{Version: "1"}, false)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got %v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := found.driver.Name() + " " + found.driver.Version(); got != c.want || !strings.Contains(found.reason, c.says) {
				t.Errorf("got %s: %s, want %s: %s", got, found.reason, c.want, c.says)
			}
			for _, name := range []string{"cloud-hypervisor", "qemu"} {
				if d := found.all[name]; d == nil {
					t.Errorf("nobody attaches to VMs of %s", name)
				} else if _, err := d.Attach(t.Context(), vmm.Config{ID: "x", Dir: t.TempDir()}); err == nil || !strings.Contains(err.Error(), vmm.ErrGone.Error()) {
					t.Errorf("%s attaches: %v", name, err)
				}
			}
			if c.hv == missing {
				if _, err := found.all["cloud-hypervisor"].Launch(t.Context(), vmm.Config{Dir: t.TempDir()}); !errdefs.IsNotFound(err) {
					t.Errorf("what is missing launches: %v", err)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(config.State, probePrefix+"*")); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// TestWhatIsChosenWorks: with QEMU as it is here, and KVM where it truly works, a guest boots.
func TestWhatIsChosenWorks(t *testing.T) {
	state, err := os.MkdirTemp("", "cd-") // not the test's: that one's path is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(state) })
	config, guest := Config{Driver: "auto", State: state}, vmmtest.Guest(t)
	config.VM.CloudHV, config.VM.QEMU = missing, "qemu-system-x86_64"
	found, err := chooseDriver(t.Context(), config, guest, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s %s: %s", found.driver.Name(), found.driver.Version(), found.reason)
	// Emulated on a busy machine the TSC is not what the kernel measures it to be.
	guest.Cmdline += " tsc=unstable"
	if err := bootProbe(t.Context(), config, guest, found.driver); err != nil {
		t.Error(err)
	}
}

// emptyGuest makes one that only looks like a guest.
func emptyGuest(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"vmlinux": "", "initrd": "", "manifest.json": `{"format":2,"files":{"vmlinux":{},"initrd":{}}}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestConfiguredDriverIsChecked: Cloud Hypervisor is taken at its operator's word, but not by check.
func TestConfiguredDriverIsChecked(t *testing.T) {
	config := Config{Driver: "cloud-hypervisor", State: t.TempDir(), Guest: emptyGuest(t)}
	config.VM.CloudHV, config.VM.QEMU = script(t, "echo cloud-hypervisor v54.0.0"), missing
	if f := checkDriver(t.Context(), config); f.err == nil || strings.Contains(f.err.Error(), "guest") {
		t.Errorf("check says: %s, %v", f.detail, f.err)
	}
}

// TestEmulationIsAWarning: check says what to do, and asks KVM anew, whatever is known of it from before.
func TestEmulationIsAWarning(t *testing.T) {
	config := Config{Driver: "qemu", State: t.TempDir(), Guest: emptyGuest(t)}
	asked := filepath.Join(t.TempDir(), "asked")
	config.VM.CloudHV = missing
	config.VM.QEMU = script(t, `case "$*" in *-version*) echo QEMU emulator version 7.2.22;; *) echo x >>`+asked+`; echo KVM: no >&2; exit 1;; esac`)
	for n := range 2 {
		f := checkDriver(t.Context(), config)
		if f.err == nil || !f.warn || !strings.Contains(f.err.Error(), "by emulation") || strings.Count(f.err.Error(), mendDevice) != 1 {
			t.Errorf("check says: %s, %v", f.detail, f.err)
		}
		if _, err := os.Stat(device); err != nil {
			continue
		}
		if data, _ := os.ReadFile(asked); strings.Count(string(data), "x") != n+1 {
			t.Errorf("KVM was tried %d times by %d checks", strings.Count(string(data), "x"), n+1)
		}
	}
}

// TestReadyNeedsKVM: where VMs run by it, and only there.
func TestReadyNeedsKVM(t *testing.T) {
	hv, q := script(t, "echo cloud-hypervisor v54.0.0"), script(t, "echo QEMU emulator version 7.2.22")
	h, err := cloudhv.New(t.Context(), hv)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	kvm, err := qemu.New(t.Context(), q, qemu.KVM)
	if err != nil {
		t.Fatal(err)
	}
	emulated, err := qemu.New(t.Context(), q, qemu.TCG)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		driver  program
		devices int
		says    string
	}{{h, 1, "kvm"}, {kvm, 1, "kvm"}, {emulated, 0, "emulation"}} {
		if n := needs(Config{}, guestimage.Files{}, c.driver); len(n.Devices) != c.devices || c.devices > 0 && n.Devices[0].Name != device {
			t.Errorf("%s %s needs %+v", c.driver.Name(), c.driver.Version(), n.Devices)
		}
		if got := accelerator(c.driver); got != c.says {
			t.Errorf("%s %s runs by %s", c.driver.Name(), c.driver.Version(), got)
		}
	}
}

// TestSizes: no VM is asked to have more than its driver can give it.
func TestSizes(t *testing.T) {
	q, err := qemu.New(t.Context(), script(t, "echo QEMU emulator version 7.2.22"), qemu.KVM)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ cpus, most, node, size, max int }{
		"small node":           {1, 0, 8, 1, 8},
		"large node":           {1, 0, 384, 1, 255},
		"large, and asked for": {1, 384, 8, 1, 255},
		"all of it":            {300, 0, 384, 255, 255},
		"more than the node":   {4, 0, 2, 4, 4},
		"as configured":        {1, 16, 384, 1, 16},
	} {
		config := defaults()
		config.VM.CPUs, config.VM.MaxCPUs, config.VM.MaxClone = c.cpus, c.most, 8<<30
		size, most, clone := config.sizes(vmm.Size{CPUs: c.node, Memory: 64 << 30}, q)
		if size.CPUs != c.size || most.CPUs != c.max || clone.CPUs != c.max || most.Memory != 64<<30 || clone.Memory != 8<<30 {
			t.Errorf("%s: %v, %v, clones %v", name, size, most, clone)
		}
	}
}
