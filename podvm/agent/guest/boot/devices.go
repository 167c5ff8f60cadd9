package boot

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// preload are modules that nearly every pod needs: a template has them, a clone need not load them.
var preload = []string{"virtio_blk", "virtio_net", "erofs", "overlay", "fuse", "crc32c_intel"}

// drivers loads the drivers of the devices that are there, and what pods will need.
func (g *Guest) drivers() error {
	if err := g.modules.load("virtio_pci", "virtio_console"); err != nil {
		return err
	}
	// PCI functions, and the virtio devices found on them.
	for _, bus := range []string{"pci", "virtio"} {
		files, err := filepath.Glob("/sys/bus/" + bus + "/devices/*/modalias")
		if err != nil {
			return err
		}
		for _, file := range files {
			alias, err := os.ReadFile(file)
			if err != nil {
				continue // unplugged meanwhile
			}
			if err := g.driver(strings.TrimSpace(string(alias))); err != nil {
				return err
			}
		}
	}
	return g.modules.load(preload...)
}

func (g *Guest) driver(alias string) error {
	names, err := g.modules.resolve(alias)
	if err != nil {
		return err
	}
	return g.modules.load(names...)
}

// watch follows the kernel's device events.
func (g *Guest) watch() error {
	for file, value := range map[string]string{
		// Memory that is plugged in comes into use at once; as much of it as the kernel can spare
		// for movable pages only, so that it can be unplugged again.
		"/sys/devices/system/memory/auto_online_blocks":       "online",
		"/sys/module/memory_hotplug/parameters/online_policy": "auto-movable",
	} {
		if err := write(file, value); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("watch devices: %w", err)
	}
	// Room for bursts: growing by many memory blocks at once.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20); err != nil {
		return fmt.Errorf("watch devices: %w", err)
	}
	const kernelGroup = 1
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		return fmt.Errorf("watch devices: %w", err)
	}
	go g.follow(os.NewFile(uintptr(fd), "uevents"))
	return nil
}

func (g *Guest) follow(events *os.File) {
	buf := make([]byte, 16<<10)
	for {
		n, err := events.Read(buf)
		switch {
		case errors.Is(err, unix.ENOBUFS): // some were lost; what matters is looked up, not told
			procs()
			g.notePort()
			continue
		case err != nil:
			slog.Error("watch devices", "err", err)
			return
		}
		g.handle(parseEvent(buf[:n]))
	}
}

// event is a uevent: its variables (ACTION, DEVPATH, SUBSYSTEM, MODALIAS, ...).
type event map[string]string

func parseEvent(b []byte) event {
	e := make(event)
	for field := range bytes.SplitSeq(b, []byte{0}) {
		if key, value, ok := bytes.Cut(field, []byte("=")); ok {
			e[string(key)] = string(value)
		}
	}
	return e
}

func (g *Guest) handle(e event) {
	switch subsystem, action := e["SUBSYSTEM"], e["ACTION"]; {
	case subsystem == "cpu" && action == "add":
		if err := write(filepath.Join("/sys", e["DEVPATH"], "online"), "1"); err != nil {
			slog.Error("use a vCPU", "device", e["DEVPATH"], "err", err)
		}
	case subsystem == "cpu":
		procs()
	case subsystem == "virtio-ports":
		g.notePort()
	case action == "add" && (subsystem == "pci" || subsystem == "virtio" || subsystem == "nd"):
		if err := g.driver(e["MODALIAS"]); err != nil {
			slog.Error("load a driver", "device", e["DEVPATH"], "err", err)
		}
	}
}

func (g *Guest) notePort() {
	select {
	case g.ports <- struct{}{}:
	default:
	}
}

func onlineCPUs() int {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return 1
	}
	return set.Count()
}
