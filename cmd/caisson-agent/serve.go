package main

import (
	"context"
	"net"

	"github.com/caisson-vm/caisson/podvm/agent/guest"
)

// server returns what serves the agent's streams on each of the VM's channels.
func server() (func(context.Context, net.Listener) error, error) {
	a, err := guest.New(guest.Options{Version: version})
	if err != nil {
		return nil, err
	}
	return a.Serve, nil
}
