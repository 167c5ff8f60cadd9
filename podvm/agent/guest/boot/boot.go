// Package boot makes a usable guest of a kernel that has just started the agent as its PID 1:
// mounts, limits, modules, devices as they are plugged, and the channel to the host.
//
// What a clone of a template writes it pays for, so nothing here runs without a cause: no timers,
// no polling; after Init there is one goroutine that waits for the kernel's events.
package boot

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
)

// Init sets up the guest. It may be called once, by PID 1. When it returns the guest's file
// systems are mounted, the devices that the VMM started with have their drivers, and hot-added
// vCPUs and memory come into use by themselves. Listen is next.
func Init() (*Guest, error) {
	// A small heap that is collected early: the agent's memory is paid for in every pod.
	debug.SetGCPercent(50)
	if err := mountAll(early); err != nil {
		return nil, err
	}
	if err := ownRoot(); err != nil {
		return nil, err
	}
	if err := mountAll(late); err != nil {
		return nil, err
	}
	if err := links(); err != nil {
		return nil, err
	}
	if err := delegate(); err != nil {
		return nil, err
	}
	if err := limits(); err != nil {
		return nil, err
	}
	if err := loopback(); err != nil {
		return nil, err
	}
	m, err := kernelModules()
	if err != nil {
		return nil, err
	}
	aliases, err := m.aliases(hardware...)
	if err != nil {
		return nil, err
	}
	g := &Guest{modules: m, aliases: aliases, loaded: make(map[string]bool), ports: make(chan struct{}, 1)}
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

// Guest is a guest that is set up.
type Guest struct {
	modules modules
	// aliases are those of hardware.
	aliases []alias
	// loaded are the drivers loaded for plugged devices; it belongs to follow, once that runs.
	loaded map[string]bool
	// ports gets a value when a virtio-serial port appears.
	ports chan struct{}
}

// Fatal writes why the agent can't go on to the kernel's log and the console, and ends it. The
// kernel then panics, which the VMM sees at once.
func Fatal(err error) {
	text := fmt.Sprintf("caisson-agent: %v\n", err)
	os.Stderr.WriteString(text)
	if f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
		f.WriteString("<2>" + text)
		f.Close()
	}
	os.Exit(1)
}

// procs follows the number of vCPUs. The agent moves bytes and waits, so that more than a few
// would only cost memory.
func procs() {
	const most = 4
	if n := min(onlineCPUs(), most); n != runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(n)
	}
}
