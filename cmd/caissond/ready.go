package main

import (
	"context"

	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm/qemu"
	"github.com/caisson-vm/caisson/server"
)

// runtimeReady checks, while the daemon runs, that it still has what it began with.
func runtimeReady(c Config, g guestimage.Files, driver string) func(context.Context) error {
	const build = "build the guest again with 'caissond guest build'"
	program := c.VM.CloudHV
	if driver == qemu.Name {
		program = c.VM.QEMU
	}
	return server.Ready(server.Needs{
		Root:     c.Root,
		Programs: []server.Need{{Name: program, Mend: "install " + driver + " again"}},
		Files:    []server.Need{{Name: g.Kernel, Mend: build}, {Name: g.Initrd, Mend: build}},
	})
}
