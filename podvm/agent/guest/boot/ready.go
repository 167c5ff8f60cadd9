package boot

import (
	"log/slog"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/mdlayher/vsock"
)

// announce tells the host once that streams are accepted on vsock, so that it need not try. Over a
// serial port the channel's own handshake says so.
func announce() {
	c, err := vsock.Dial(vsock.Host, vmm.ReadyPort, nil)
	if err != nil {
		slog.Error("announce to the host", "err", err)
		return
	}
	c.Close()
}
