package main

import (
	"context"
	"net"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// serve answers every stream that nothing serves it yet.
func serve(ctx context.Context, l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			var h agent.Header
			if err := agent.ReadMessage(c, &h); err != nil {
				return
			}
			agent.WriteMessage(c, agent.Reply{Error: "agent " + version + " serves no " + string(h.Kind), Code: "unavailable"})
		}()
	}
}
