package guest

import (
	"context"
	"io"
	"net"
	"sync"

	"github.com/caisson-vm/caisson/podvm/agent"
)

type closeWriter interface{ CloseWrite() error }

// portForward joins a stream to a TCP port on the guest's loopback; either side's half-close is
// passed on.
func portForward(ctx context.Context, c net.Conn, port uint16) error {
	conn, err := dialLoopback(ctx, port)
	if err != nil {
		return refuse(c, err)
	}
	defer conn.Close()
	if err := agent.WriteMessage(c, agent.Reply{}); err != nil {
		return err
	}
	var both sync.WaitGroup
	both.Go(func() { pour(conn, c) })
	both.Go(func() { pour(c, conn) })
	both.Wait()
	return nil
}

// pour copies until the end of src and closes dst for writing; if dst fails it closes both, so that
// the other direction ends too.
func pour(dst, src net.Conn) {
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		src.Close()
		return
	}
	if w, ok := dst.(closeWriter); !ok || w.CloseWrite() != nil {
		dst.Close()
	}
}
