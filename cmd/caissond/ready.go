package main

import (
	"context"

	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm/qemu"
	"github.com/caisson-vm/caisson/server"
)

// runtimeReady checks, while the daemon runs, that it still has what it began with.
func runtimeReady(c Config, g guestimage.Files, driver program) func(context.Context) error {
	return server.Ready(needs(c, g, driver))
}

func needs(c Config, g guestimage.Files, driver program) server.Needs {
	const build = "build the guest again with 'caissond guest build', and start the daemon again"
	program := c.VM.CloudHV
	if driver.Name() == qemu.Name {
		program = c.VM.QEMU
	}
	n := server.Needs{
		Root:     c.Root,
		Programs: []server.Need{{Name: program, Mend: "install " + driver.Name() + " again"}},
		Files:    []server.Need{{Name: g.Kernel, Mend: build}, {Name: g.Initrd, Mend: build}},
	}
	if driver.KVM() {
		n.Devices = []server.Need{{Name: device, Mend: mendDevice}}
	}
	return n
}
