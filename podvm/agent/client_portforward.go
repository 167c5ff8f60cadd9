package agent

import (
	"context"
	"net"
)

// PortForward connects to a TCP port on the loopback of the pod: 127.0.0.1, or else ::1. The
// connection has CloseWrite. A port where nothing listens is ErrFailedPrecondition.
func (c *Client) PortForward(ctx context.Context, port uint16) (net.Conn, error) {
	return c.open(ctx, Header{Kind: KindPortForward, Port: port})
}
