package network

import (
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"
)

// TestLeasesStayOutside: a DHCP server's answer reaches who has asked in the namespace, and not the guest, whichever
// classifier the kernel has; other datagrams reach the guest.
func TestLeasesStayOutside(t *testing.T) {
	for first, c := range classifiers {
		t.Run(c.kind, func(t *testing.T) {
			n := newBridgeNode(t)
			n.kind.Store(int32(first))
			a := n.setup(t, n.pod(1))
			defer n.teardown(t, n.pod(1).ID)
			var client net.PacketConn
			if err := inNetNS(a.NetNS, func() (err error) { client, err = net.ListenPacket("udp4", ":68"); return err }); err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			g := newGuest(t, n, a)
			introduce(t, n.bridge, netip.MustParseAddr(a.IPs()[0]), g.mac)
			for _, port := range []int{68, 67} {
				conn, err := net.Dial("udp", net.JoinHostPort(a.IPs()[0], strconv.Itoa(port)))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := conn.Write([]byte("lease")); err != nil {
					t.Fatal(err)
				}
			}
			if port := receive(t, g.syn); port != 67 {
				t.Errorf("the guest has got what was for port %d", port)
			}
			if err := client.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, _, err := client.ReadFrom(make([]byte, 100)); err != nil {
				t.Errorf("the namespace has not got the lease: %v", err)
			}
		})
	}
}
