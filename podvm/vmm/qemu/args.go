package qemu

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/tail"
)

const (
	// memoryBlock is what virtio-mem plugs and unplugs at once, in bytes.
	memoryBlock = 2 << 20
	// translated is the size of the buffer for translated code, in MiB: the kernel and crun fit.
	translated = 64
	// Descriptors that the process is started with.
	qmpFD, channelFD, tapFD = 3, 4, 5
)

// Device and backend ids.
const (
	channelID = "agent"
	pluggable = "hotmem"
)

// args is the command line of a VM with this shape: few devices, no default ones.
func (s shape) args(c vmm.Config) []string {
	args := []string{
		"-name", "caisson-" + c.ID,
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", "pc,usb=off,vmport=off,graphics=off,hpet=off,memory-backend=ram",
		"-smp", fmt.Sprintf("%d,maxcpus=%d", s.Size.CPUs, s.Max.CPUs),
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", qmpFD),
		"-mon", "chardev=qmp,mode=control",
		"-chardev", fmt.Sprintf("socket,id=channel,fd=%d,server=on,wait=off", channelFD),
		"-device", "virtio-serial-pci,max_ports=2",
		"-device", "virtserialport,chardev=channel,name=caisson,id=" + channelID,
		"-chardev", "file,id=console,path=" + escape(tail.PipePath(tail.ConsolePath(c.Dir))),
		"-device", "isa-serial,chardev=console",
		"-device", "pvpanic",
	}
	if d := c.Disk; d != nil {
		args = append(args, "-blockdev", blockdev(*d).String(),
			"-device", blkdev(*d).String())
	}
	if c.Tap != nil {
		args = append(args, "-netdev", fmt.Sprintf("tap,id=%s,fd=%d,vhost=off", cardID+backing, tapFD),
			"-device", fmt.Sprintf("virtio-net-pci,id=%s,netdev=%s,mac=%s,romfile=", cardID, cardID+backing, vmm.CardMAC))
	}
	args = append(args, s.cpu()...)
	args = append(args, s.memory(c)...)
	if c.Template != "" {
		return append(args, "-incoming", "defer")
	}
	return append(args, "-kernel", c.Kernel, "-initrd", c.Initrd, "-append", "console=ttyS0 "+c.Cmdline)
}

func (s shape) cpu() []string {
	if s.Accel == KVM {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	// Where each vCPU has a thread, QEMU ends when one is plugged in while the buffer for translated
	// code happens to be full; then they share one.
	threads := "single"
	if s.Size.CPUs == s.Max.CPUs {
		threads = "multi"
	}
	return []string{"-accel", fmt.Sprintf("tcg,thread=%s,tb-size=%d", threads, translated), "-cpu", "max"}
}

// memory of the VM: what it starts with, and what can be plugged.
func (s shape) memory(c vmm.Config) []string {
	backend := "memory-backend-ram,id=ram,reserve=off"
	switch {
	case c.Template != "":
		backend = "memory-backend-file,id=ram,share=off,reserve=off,mem-path=" + escape(filepath.Join(c.Template, s.Memory))
	case c.MemoryFile != "":
		backend = "memory-backend-file,id=ram,share=on,mem-path=" + escape(c.MemoryFile)
	default:
		// Not where memory is a file or will be: there QEMU gives pages back by punching holes into
		// the file, and a clone would punch them into its template.
	}
	args := []string{"-object", fmt.Sprintf("%s,size=%d", backend, s.Size.Memory)}
	if c.Template == "" && c.MemoryFile == "" {
		args = append(args, "-device", "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on")
	}
	size := fmt.Sprint("size=", s.Size.Memory, "b")
	if hot := s.hotplug(); hot > 0 {
		size = fmt.Sprintf("size=%db,slots=1,maxmem=%db", s.Size.Memory, s.Size.Memory+hot)
		args = append(args,
			"-object", fmt.Sprintf("memory-backend-ram,id=hotram,reserve=off,size=%d", hot),
			"-device", fmt.Sprintf("virtio-mem-pci,id=%s,memdev=hotram,block-size=%d,requested-size=0", pluggable, memoryBlock))
	}
	return append(args, "-m", size)
}

// hotplug is how many bytes of memory can be added.
func (s shape) hotplug() int64 {
	return vmm.Config{Size: s.Size, Max: s.Max}.Pluggable()
}

// escape doubles commas, which separate QEMU's options.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }
