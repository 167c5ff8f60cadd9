package cloudhv

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/machine"
	"github.com/caisson-vm/caisson/podvm/vmm/tail"
)

// The part of Cloud Hypervisor's VmConfig that is in use.
// Source: vmm/src/vm_config.rs of Cloud Hypervisor.
type vmConfig struct {
	CPUs    cpusConfig    `json:"cpus"`
	Memory  memoryConfig  `json:"memory"`
	Payload payloadConfig `json:"payload"`
	Disks   []diskConfig  `json:"disks,omitempty"`
	Pmem    []pmemConfig  `json:"pmem,omitempty"`
	Balloon balloonConfig `json:"balloon"`
	Serial  consoleConfig `json:"serial"`
	Console consoleConfig `json:"console"`
	Vsock   vsockConfig   `json:"vsock"`
	PVPanic bool          `json:"pvpanic"`
}

type cpusConfig struct {
	Boot int `json:"boot_vcpus"`
	Max  int `json:"max_vcpus"`
	// Nested virtualization inside a pod is not offered: it is a large part of KVM's attack surface.
	Nested bool `json:"nested"`
}

type memoryConfig struct {
	Size          int64        `json:"size"`
	HotplugMethod string       `json:"hotplug_method"`
	Zones         []zoneConfig `json:"zones"`
}

type zoneConfig struct {
	ID          string `json:"id"`
	Size        int64  `json:"size"`
	File        string `json:"file,omitempty"`
	Shared      bool   `json:"shared"`
	HotplugSize int64  `json:"hotplug_size,omitempty"`
}

type payloadConfig struct {
	Kernel    string `json:"kernel"`
	Initramfs string `json:"initramfs"`
	Cmdline   string `json:"cmdline"`
}

type balloonConfig struct {
	Size              int64 `json:"size"`
	DeflateOnOOM      bool  `json:"deflate_on_oom"`
	FreePageReporting bool  `json:"free_page_reporting"`
}

type consoleConfig struct {
	Mode string `json:"mode"`
	File string `json:"file,omitempty"`
}

type vsockConfig struct {
	CID    uint32 `json:"cid"`
	Socket string `json:"socket"`
}

type diskConfig struct {
	ID        string `json:"id"`
	Path      string `json:"path"`
	ReadOnly  bool   `json:"readonly"`
	Serial    string `json:"serial"`
	NumQueues int    `json:"num_queues"`
	// ImageType is never guessed: a guest could write another format's header onto its disk.
	ImageType string `json:"image_type"`
}

type pmemConfig struct {
	ID            string `json:"id"`
	File          string `json:"file"`
	DiscardWrites bool   `json:"discard_writes"`
}

// netConfig names no MTU: Cloud Hypervisor would set it on an interface of the tap's name in its own
// network namespace, where there is none. The agent sets it in the guest.
type netConfig struct {
	ID  string `json:"id"`
	MAC string `json:"mac"`
}

// restoreConfig is the part of Cloud Hypervisor's RestoreConfig that is in use. The descriptors
// themselves travel beside the request.
// Source: vmm/src/config.rs of Cloud Hypervisor.
type restoreConfig struct {
	SourceURL string   `json:"source_url"`
	NetFDs    []netFDs `json:"net_fds,omitempty"`
}

type netFDs struct {
	ID    string `json:"id"`
	Count int    `json:"num_fds"`
}

const (
	zone = "mem0"
	// guestCID is the same in every VM: each has a socket of its own.
	guestCID = 3
	// memoryBlock is what virtio-mem plugs and unplugs at once on x86.
	memoryBlock = 128 << 20
	// platform is what the guest is told of the machine: that the ports of PCI configuration are taken, so
	// that it uses memory for that. Ports take two exits to the VMM for one access, and a device that is
	// plugged some hundreds of accesses.
	platform = "console=ttyS0 reserve=0xcf8,8 "
)

// bootConfig is the configuration of a cold boot.
func bootConfig(c vmm.Config) vmConfig {
	config := vmConfig{
		CPUs: cpusConfig{Boot: c.Size.CPUs, Max: c.Max.CPUs},
		Memory: memoryConfig{HotplugMethod: "VirtioMem", Zones: []zoneConfig{{
			ID: zone, Size: c.Size.Memory, File: c.MemoryFile, Shared: c.MemoryFile != "",
			HotplugSize: c.Pluggable(),
		}}},
		Payload: payloadConfig{c.Kernel, c.Initrd, platform + c.Cmdline},
		Balloon: balloonConfig{DeflateOnOOM: true, FreePageReporting: true},
		Serial:  consoleConfig{"File", tail.PipePath(tail.ConsolePath(c.Dir))},
		Console: consoleConfig{Mode: "Off"},
		Vsock:   vsockConfig{guestCID, vsockPath(c.Dir)},
		PVPanic: true,
	}
	if c.Disk != nil {
		config.Disks = []diskConfig{disk(*c.Disk)}
	}
	if c.MemoryFile != "" {
		config.Pmem = []pmemConfig{{primerID, primerPath(filepath.Dir(c.MemoryFile)), true}}
	}
	return config
}

// primerID is a pmem device that templates have, and their clones for good; there is nothing in it. When
// the first one comes, Linux patches its own text, some sixty pages of it, and when the last one goes, again:
// each clone would have to, with its first image, and have the pages for its own.
// Source: devmap_managed_key in mm/memremap.c of Linux 6.12.
const primerID = "primer"

func primerPath(template string) string { return filepath.Join(template, "primer") }

func disk(d vmm.Disk) diskConfig {
	return diskConfig{machine.DiskID(d.Serial), d.Path, d.ReadOnly, d.Serial, 1, "Raw"}
}

// cloneDir makes the folder that a clone is restored from: the template's files by symbolic links,
// and a configuration that names the clone's own paths and maps the template's memory copy-on-write.
func cloneDir(c vmm.Config) (string, error) {
	dir := filepath.Join(c.Dir, "restore")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("clone of %s: %w", c.Template, err)
	}
	data, err := os.ReadFile(filepath.Join(c.Template, "config.json"))
	if err != nil {
		return "", fmt.Errorf("clone of %s: %w", c.Template, err)
	}
	if err := checkMemory(data, c); err != nil {
		return "", fmt.Errorf("clone of %s: %w", c.Template, err)
	}
	data, err = cloneConfig(data, c)
	if err != nil {
		return "", fmt.Errorf("clone of %s: config.json: %w", c.Template, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600); err != nil {
		return "", fmt.Errorf("clone of %s: %w", c.Template, err)
	}
	for _, name := range []string{"state.json", "memory-ranges"} {
		if err := os.Symlink(filepath.Join(c.Template, name), filepath.Join(dir, name)); err != nil {
			return "", fmt.Errorf("clone of %s: %w", c.Template, err)
		}
	}
	return dir, nil
}

// checkMemory sees that a template's memory is all there: a clone would die on the first page that is
// not.
func checkMemory(data []byte, c vmm.Config) error {
	var snapshot struct {
		Memory struct {
			Zones []struct {
				File string
				Size int64
			}
		}
	}
	if err := json.Unmarshal(data, &snapshot); err != nil {
		return fmt.Errorf("config.json: %w", err)
	}
	for _, zone := range snapshot.Memory.Zones {
		if zone.File == "" {
			continue
		}
		info, err := os.Stat(filepath.Join(c.Template, filepath.Base(zone.File)))
		if err != nil {
			return err
		}
		if info.Size() != zone.Size {
			return fmt.Errorf("the memory file has %d bytes, want %d: %w", info.Size(), zone.Size, errdefs.ErrDataLoss)
		}
	}
	return nil
}

// cloneConfig edits a snapshot's config.json, and leaves alone all that it does not know.
func cloneConfig(data []byte, c vmm.Config) ([]byte, error) {
	var snapshot map[string]any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&snapshot); err != nil {
		return nil, err
	}
	memory, _ := snapshot["memory"].(map[string]any)
	zones, _ := memory["zones"].([]any)
	vsock, _ := snapshot["vsock"].(map[string]any)
	serial, _ := snapshot["serial"].(map[string]any)
	if len(zones) != 1 || vsock == nil || serial == nil {
		return nil, errors.New("not the snapshot of a template: want one memory zone, a vsock and a serial port")
	}
	first, _ := zones[0].(map[string]any)
	file, _ := first["file"].(string)
	if file == "" {
		return nil, errors.New("not the snapshot of a template: its memory is in no file")
	}
	first["file"] = filepath.Join(c.Template, filepath.Base(file))
	first["shared"] = false
	if err := cloneDisk(snapshot, c.Disk); err != nil {
		return nil, err
	}
	if err := clonePrimer(snapshot, c.Template); err != nil {
		return nil, err
	}
	vsock["socket"] = vsockPath(c.Dir)
	serial["file"] = tail.PipePath(tail.ConsolePath(c.Dir))
	return json.Marshal(snapshot)
}

// cloneDisk gives the clone its own file for the template's disk.
func cloneDisk(snapshot map[string]any, d *vmm.Disk) error {
	disks, _ := snapshot["disks"].([]any)
	if d == nil && len(disks) == 0 {
		return nil
	}
	if d != nil && len(disks) == 1 {
		if first, ok := disks[0].(map[string]any); ok && first["serial"] == d.Serial {
			first["path"] = d.Path
			return nil
		}
	}
	return fmt.Errorf("not the snapshot of a template with the same disk: it has %d disks", len(disks))
}

// clonePrimer names the primer's file where the template is now.
func clonePrimer(snapshot map[string]any, template string) error {
	all, _ := snapshot["pmem"].([]any)
	if len(all) == 1 {
		if primer, ok := all[0].(map[string]any); ok && primer["id"] == primerID {
			primer["file"] = primerPath(template)
			return nil
		}
	}
	return fmt.Errorf("not the snapshot of a template: it has %d pmem devices, want one, %q", len(all), primerID)
}

func apiPath(dir string) string    { return filepath.Join(dir, "api.sock") }
func vsockPath(dir string) string  { return filepath.Join(dir, "vsock.sock") }
func eventsPath(dir string) string { return filepath.Join(dir, "events.json") }

// readyPath is where Cloud Hypervisor connects when the guest dials the host's port readyPort.
func readyPath(dir string) string { return fmt.Sprintf("%s_%d", vsockPath(dir), vmm.ReadyPort) }
