// Package boot makes a usable guest of a kernel that has just started the agent as its PID 1:
// mounts, limits, modules, devices as they are plugged, and the channel to the host.
//
// What a clone of a template writes it pays for, so nothing here runs without a cause: no timers,
// no polling; after Init there is one goroutine that waits for the kernel's events.
package boot

import (
	"fmt"
	"os"
)

// Init sets up the guest. It may be called once, by PID 1. When it returns the guest's file
// systems are mounted, the devices that the VMM started with have their drivers, and hot-added
// vCPUs and memory come into use by themselves. Guest.Serve is next.
func Init() (*Guest, error) {
	if err := os.Setenv("PATH", "/usr/bin:/bin:/usr/sbin:/sbin"); err != nil {
		return nil, err
	}
	for _, step := range []func() error{mountEarly, ownRoot, mountLate, links, delegate, limits, calm, loopback} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return devices()
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
