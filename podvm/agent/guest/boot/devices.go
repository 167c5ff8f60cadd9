package boot

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Guest is a guest that is set up.
type Guest struct {
	modules modules
	// aliases are those of hardware.
	aliases []alias
	// loaded are the drivers loaded for plugged devices; it belongs to follow, once that runs.
	loaded map[string]bool
	// ports gets a value when a virtio-serial port appears.
	ports chan struct{}
	// balloon is held by who binds its driver.
	balloon sync.Mutex
}

// devices gets the drivers for the devices there are and waits for more.
func devices() (*Guest, error) {
	m, err := kernelModules()
	if err != nil {
		return nil, err
	}
	aliases, err := m.aliases(hardware...)
	if err != nil {
		return nil, err
	}
	g := &Guest{modules: m, aliases: aliases, loaded: make(map[string]bool), ports: make(chan struct{}, 1)}
	// Events are kept from here on, and handled once what was there before has its drivers.
	events, err := watch()
	if err != nil {
		return nil, err
	}
	if err := g.drivers(); err != nil {
		return nil, err
	}
	go g.follow(events)
	return g, nil
}

// hardware are the prefixes of the aliases of devices.
var hardware = []string{"pci:", "virtio:", "acpi*:", "nd:"}

// drivers loads what every guest needs and the drivers of the devices that are there.
func (g *Guest) drivers() error {
	names, err := g.modules.boot()
	if err != nil {
		return err
	}
	if err := g.modules.load(names...); err != nil {
		return err
	}
	present, err := g.present()
	if err != nil {
		return err
	}
	if err := g.modules.load(present...); err != nil {
		return err
	}
	for _, name := range append(present, names...) {
		g.loaded[name] = true
	}
	return nil
}

// present lists the drivers of the devices that are there.
func (g *Guest) present() ([]string, error) {
	found := make(map[string]bool)
	for _, bus := range []string{"pci", "virtio"} {
		devices, err := filepath.Glob("/sys/bus/" + bus + "/devices/*/modalias")
		if err != nil {
			return nil, err
		}
		for _, file := range devices {
			name, err := os.ReadFile(file)
			if err != nil {
				continue // unplugged meanwhile
			}
			for _, module := range match(g.aliases, strings.TrimSpace(string(name))) {
				found[module] = true
			}
		}
	}
	// There are dozens of ACPI devices, which all have their names in their folders' names.
	for _, a := range g.aliases {
		if id, ok := strings.CutPrefix(a.pattern, "acpi*:"); ok {
			devices, err := filepath.Glob("/sys/bus/acpi/devices/" + strings.TrimSuffix(id, ":*") + ":*")
			if err != nil {
				return nil, err
			}
			found[a.module] = found[a.module] || len(devices) > 0
		}
	}
	maps.DeleteFunc(found, func(_ string, there bool) bool { return !there })
	return slices.Sorted(maps.Keys(found)), nil
}

// watch returns the kernel's device events, from now on.
func watch() (*os.File, error) {
	for file, value := range map[string]string{
		// Memory that is plugged in comes into use at once; as much of it as the kernel can spare
		// for movable pages only, so that it can be unplugged again.
		"/sys/devices/system/memory/auto_online_blocks":       "online",
		"/sys/module/memory_hotplug/parameters/online_policy": "auto-movable",
	} {
		if err := write(file, value); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return uevents()
}

// uevents opens the kernel's device events.
func uevents() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("watch devices: %w", err)
	}
	// Room for bursts: growing by many memory blocks at once.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20); err != nil {
		return nil, fmt.Errorf("watch devices: %w", err)
	}
	const kernelGroup = 1
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		return nil, fmt.Errorf("watch devices: %w", err)
	}
	return os.NewFile(uintptr(fd), "uevents"), nil
}

// follow handles events as long as the guest lives.
func (g *Guest) follow(events *os.File) {
	buf := make([]byte, 16<<10)
	for {
		n, err := receive(events, buf)
		switch {
		case errors.Is(err, unix.ENOBUFS): // some were lost; what matters is looked up, not told
			g.grown()
			g.notePort()
			continue
		case err != nil:
			slog.Error("watch devices", "err", err)
			return
		}
		g.handle(parseEvent(buf[:n]))
	}
}

// receive waits for an event; 0 bytes are one that is not the kernel's. Containers share this
// network namespace, and one that may administer it can send to any netlink socket.
func receive(events *os.File, buf []byte) (n int, err error) {
	raw, err := events.SyscallConn()
	if err != nil {
		return 0, err
	}
	var from unix.Sockaddr
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		n, from, failed = unix.Recvfrom(int(fd), buf, 0)
		return failed != unix.EAGAIN
	})
	if err := errors.Join(err, failed); err != nil {
		return 0, err
	}
	if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
		return 0, nil
	}
	return n, nil
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
	case subsystem == "memory":
		g.grown()
	case subsystem == "virtio-ports":
		g.notePort()
	case action == "add" && (subsystem == "pci" || subsystem == "virtio" || subsystem == "nd"):
		g.plugged(e)
	}
}

// grown adapts the agent and the kernel to the vCPUs and the memory there are.
func (g *Guest) grown() {
	procs()
	if err := scale(); err != nil {
		slog.Error("adapt to the memory", "err", err)
	}
	go g.takeBalloon() // which takes a while; a vCPU may be waiting
}

// plugged loads the driver of a device that was plugged in.
func (g *Guest) plugged(e event) {
	names := match(g.aliases, e["MODALIAS"])
	names = slices.DeleteFunc(names, func(n string) bool { return g.loaded[n] })
	if len(names) == 0 {
		return
	}
	if err := g.modules.load(names...); err != nil {
		slog.Error("load a driver", "device", e["DEVPATH"], "err", err)
		return
	}
	for _, name := range names {
		g.loaded[name] = true
	}
}

func (g *Guest) notePort() {
	select {
	case g.ports <- struct{}{}:
	default:
	}
}

// procs follows the number of vCPUs. The agent moves bytes and waits, so that more than a few
// would only cost memory.
func procs() {
	const most = 4
	if n := min(onlineCPUs(), most); n != runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(n)
	}
}

func onlineCPUs() int {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return 1
	}
	return set.Count()
}
