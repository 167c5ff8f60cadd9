package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm"
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
			found, err := chooseDriver(t.Context(), config, guestimage.Files{Version: "1"})
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
	found, err := chooseDriver(t.Context(), config, guest)
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

// TestConfiguredDriverIsChecked: Cloud Hypervisor is taken at its operator's word, but not by check.
func TestConfiguredDriverIsChecked(t *testing.T) {
	config := Config{Driver: "cloud-hypervisor", State: t.TempDir(), Guest: t.TempDir()}
	for name, text := range map[string]string{"vmlinux": "", "initrd": "", "manifest.json": `{"format":1,"files":{"vmlinux":{},"initrd":{}}}`} {
		if err := os.WriteFile(filepath.Join(config.Guest, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config.VM.CloudHV, config.VM.QEMU = script(t, "echo cloud-hypervisor v54.0.0"), missing
	if f := checkDriver(t.Context(), config); f.err == nil || strings.Contains(f.err.Error(), "guest") {
		t.Errorf("check says: %s, %v", f.detail, f.err)
	}
}
