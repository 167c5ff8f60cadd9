package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ping sends one echo request from the node and waits for its answer.
func ping(addr netip.Addr, seq byte, timeout time.Duration) error {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if addr.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	conn, err := net.Dial(network, addr.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	msg := append([]byte{request, 0, 0, 0, 0x77, 0x77, 0, seq}, "caisson"...)
	setChecksum(msg, 2, 0) // for IPv6 the kernel does it
	if _, err := conn.Write(msg); err != nil {
		return err
	}
	conn.SetReadDeadline(time.Now().Add(timeout))
	buf := make([]byte, 1500)
	for {
		n, _, err := conn.(*net.IPConn).ReadFrom(buf) // Read would leave IPv4's header on
		if err != nil {
			return err
		}
		if n == len(msg) && buf[0] == reply && buf[7] == seq && string(buf[8:n]) == "caisson" {
			return nil
		}
	}
}

// answered pings until there is an answer: the bridge's own addresses take a moment to settle.
func answered(t *testing.T, addr netip.Addr) {
	t.Helper()
	var err error
	for seq := byte(1); seq < 20; seq++ {
		if err = ping(addr, seq, 500*time.Millisecond); err == nil {
			return
		}
	}
	t.Fatalf("ping %s: %v", addr, err)
}

func TestGuestIsReachedFromTheNode(t *testing.T) {
	n := newBridgeNode(t)
	a := n.setup(t, n.pod(1))
	defer n.teardown(t, n.pod(1).ID)
	g := newGuest(t, n, a)
	if len(g.addrs) != 2 {
		t.Fatalf("addresses %v, want IPv4 and IPv6", g.addrs)
	}
	for _, addr := range g.addrs {
		before := g.pings.Load()
		answered(t, addr)
		if g.pings.Load() == before {
			t.Errorf("%s was answered, but not by the guest", addr)
		}
	}
}

// A VM that starts while the plugins run has its tap from before.
func TestOpenBeforeSetup(t *testing.T) {
	n := newBridgeNode(t)
	p := n.pod(1)
	tap, err := n.Open(p.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Open(p.ID); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second time: %v", err)
	}
	if err := n.GC(t.Context(), nil); err != nil {
		t.Error(err)
	}
	a := n.setup(t, p)
	for _, addr := range newGuestAt(t, tap, a).addrs {
		answered(t, addr)
	}
	n.teardown(t, p.ID)
	n.wantNothingLeft(t)
}

// What was only opened goes without a plugin: none was called.
func TestOpenUndone(t *testing.T) {
	n := newBridgeNode(t, map[string]any{"type": "scripted"})
	n.script(t, "scripted", `exit 1`)
	tap, err := n.Open(n.pod(1).ID)
	if err != nil {
		t.Fatal(err)
	}
	tap.Close()
	n.teardown(t, n.pod(1).ID)
	n.wantNothingLeft(t)
}

func TestLooseTap(t *testing.T) {
	tap, err := LooseTap()
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	if _, err := tap.Write(make([]byte, vnetHeader+etherHeader)); err != nil {
		t.Errorf("send: %v", err)
	}
	if _, err := net.InterfaceByName(tap.Name()); err == nil {
		t.Errorf("%s is an interface of the node's own", tap.Name())
	}
}

func TestGuestReachesTheNode(t *testing.T) {
	n := newBridgeNode(t)
	g := newGuest(t, n, n.setup(t, n.pod(1)))
	defer n.teardown(t, n.pod(1).ID)
	gateway := netip.MustParseAddr(n.gateway)
	g.who(t, gateway)
	mac := receive(t, g.arp)
	br, err := net.InterfaceByName(n.bridge)
	if err != nil {
		t.Fatal(err)
	}
	if mac.String() != br.HardwareAddr.String() {
		t.Errorf("ARP says %s, the bridge is %s", mac, br.HardwareAddr)
	}
	g.ping(t, gateway, mac)
	if from := receive(t, g.echo); from != gateway {
		t.Errorf("echo from %s, want %s", from, gateway)
	}
}

// The namespace has the guest's addresses, but its kernel must not be heard.
func TestNobodyAnswersForTheGuest(t *testing.T) {
	n := newBridgeNode(t)
	a := n.setup(t, n.pod(1))
	defer n.teardown(t, n.pod(1).ID)
	g := newGuest(t, n, a)
	g.mute.Store(true)
	for _, addr := range g.addrs {
		introduce(t, n.bridge, addr, g.mac) // so that packets leave without ARP being answered
		if err := ping(addr, 1, 300*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("ping %s with the guest silent: %v, want a timeout", addr, err)
		}
		if g.pings.Load() == 0 {
			t.Errorf("the ping to %s did not reach the guest", addr)
		}
		g.pings.Store(0)
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		_, err := new(net.Dialer).DialContext(ctx, "tcp", netip.AddrPortFrom(addr, 80).String())
		cancel()
		if err == nil || errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("tcp to %s with the guest silent: %v, want a timeout", addr, err)
		}
	}
}

func TestNobodyAnswersWithoutVM(t *testing.T) {
	n := newBridgeNode(t)
	a := n.setup(t, n.pod(1))
	defer n.teardown(t, n.pod(1).ID)
	mac, err := net.ParseMAC(a.Interfaces[0].MAC)
	if err != nil {
		t.Fatal(err)
	}
	for _, ip := range a.IPs() {
		addr := netip.MustParseAddr(ip)
		introduce(t, n.bridge, addr, mac)
		if err := ping(addr, 1, 300*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("ping %s with no VM there: %v, want a timeout", addr, err)
		}
	}
}

// The bridge reflects what the namespace's own stack says to the guest (hairpinMode): a solicitation
// for the guest's address would look like a duplicate of it. Its multicast listener reports do come.
func TestGuestHearsNoNeighbourDiscoveryFromTheNamespace(t *testing.T) {
	n := newBridgeNode(t)
	a := n.setup(t, n.pod(1))
	defer n.teardown(t, n.pod(1).ID)
	f := openTap(t, n, a)
	defer f.Close()
	mac, err := net.ParseMAC(a.Interfaces[0].MAC)
	if err != nil {
		t.Fatal(err)
	}
	var tapMAC net.HardwareAddr
	if err := inNetNS(a.NetNS, func() error {
		tap, err := net.InterfaceByName(a.Interfaces[0].Tap)
		if err == nil {
			tapMAC = tap.HardwareAddr
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	f.SetReadDeadline(time.Now().Add(1500 * time.Millisecond)) // router solicitations come within a second
	buf := make([]byte, 1<<16)
	for {
		k, err := f.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		frame := buf[vnetHeader:k]
		src := net.HardwareAddr(frame[6:12]).String()
		const nextHeader, icmpv6 = etherHeader + 6, etherHeader + 40
		if src != mac.String() && src != tapMAC.String() {
			continue
		}
		if frame[12] == 8 || frame[nextHeader] == 58 && frame[icmpv6] >= 133 && frame[icmpv6] <= 137 {
			t.Errorf("the guest hears the namespace: % x", buf[vnetHeader:k])
		}
	}
}

// With offloads on, as a VMM has them, a checksum is left to the guest.
func TestOffloadsPass(t *testing.T) {
	n := newBridgeNode(t)
	a := n.setup(t, n.pod(1))
	defer n.teardown(t, n.pod(1).ID)
	f := openTap(t, n, a)
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) {
		err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6)
	}); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	addr := netip.MustParseAddr(a.IPs()[0])
	mac, err := net.ParseMAC(a.Interfaces[0].MAC)
	if err != nil {
		t.Fatal(err)
	}
	introduce(t, n.bridge, addr, mac)
	conn, err := net.Dial("udp", netip.AddrPortFrom(addr, 9).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("caisson")); err != nil {
		t.Fatal(err)
	}
	f.SetReadDeadline(time.Now().Add(3 * time.Second))
	buf := make([]byte, 1<<16)
	for {
		k, err := f.Read(buf)
		if err != nil {
			t.Fatal("no datagram:", err)
		}
		if string(buf[k-7:k]) == "caisson" {
			break
		}
	}
	if buf[0]&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
		t.Errorf("virtio-net header % x has a finished checksum", buf[:vnetHeader])
	}
}

func TestPortMapping(t *testing.T) {
	n := newBridgeNode(t)
	p := n.pod(1)
	p.PortMappings = []PortMapping{
		{Protocol: "TCP", ContainerPort: 80, HostPort: 18080},
		{Protocol: "udp", ContainerPort: 53, HostPort: 18053},
		{Protocol: "tcp", ContainerPort: 443},
	}
	g := newGuest(t, n, n.setup(t, p))
	defer n.teardown(t, p.ID)
	answered(t, g.addrs[0])
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go new(net.Dialer).DialContext(ctx, "tcp", n.gateway+":18080")
	if port := receive(t, g.syn); port != 80 {
		t.Errorf("tcp came to port %d, want 80", port)
	}
	cancel()
	conn, err := net.Dial("udp", n.gateway+":18053")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("?")); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; {
		port := receive(t, g.syn)
		if port == 53 {
			break
		}
		if port != 80 || time.Now().After(deadline) { // 80: the connection attempt, sent again
			t.Fatalf("udp came to port %d, want 53", port)
		}
	}
}

func TestBandwidthReachesThePlugin(t *testing.T) {
	n := newBridgeNode(t, map[string]any{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}})
	p := n.pod(1)
	p.Annotations = map[string]string{ingressAnnotation: "10M", egressAnnotation: "8M"}
	n.setup(t, p)
	defer n.teardown(t, p.ID)
	var rates []uint64
	qdiscs, err := dump(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(nil) })
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range qdiscs {
		if tbf, ok := q.(*netlink.Tbf); ok {
			rates = append(rates, tbf.Rate*8)
		}
	}
	if got := fmt.Sprint(rates); got != "[10000000 8000000]" && got != "[8000000 10000000]" {
		t.Errorf("shaped to %s bits per second", got)
	}
}

// introduce tells the node the MAC of a neighbour behind the bridge.
func introduce(t *testing.T, bridge string, addr netip.Addr, mac net.HardwareAddr) {
	t.Helper()
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.NeighSet(&netlink.Neigh{
		LinkIndex: br.Attrs().Index, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: mac,
	}); err != nil {
		t.Fatal(err)
	}
}

func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(5 * time.Second):
		t.Fatal("nothing came within 5 s")
		panic("unreachable")
	}
}

// captureFrames reads what arrives at a link, until the function says that it has seen enough.
func captureFrames(t *testing.T, link string, send func(), enough func(frame []byte) bool) {
	t.Helper()
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in the network's byte order
	i, err := net.InterfaceByName(link)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	err = errors.Join(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: i.Index}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}))
	if err != nil {
		t.Fatal(err)
	}
	send()
	for buf := make([]byte, 2000); ; {
		size, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			t.Fatal("no more frames: ", err)
		}
		if enough(buf[:size]) {
			return
		}
	}
}

// TestTemplatesCardIsNotAnnounced: what a VMM sends by RARP for a clone, with the address of the template's
// card, does not leave the pod, and other frames do.
func TestTemplatesCardIsNotAnnounced(t *testing.T) {
	n := newBridgeNode(t)
	a := n.setup(t, n.pod(1))
	defer n.teardown(t, n.pod(1).ID)
	g := newGuest(t, n, a)
	const rarp, experimental = 0x8035, 0x88b5
	frame := func(from net.HardwareAddr, kind uint16) []byte {
		f := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, from...)
		return append(binary.BigEndian.AppendUint16(f, kind), make([]byte, 46)...)
	}
	send := func() {
		if err := errors.Join(g.send(frame(net.HardwareAddr{2, 0, 0, 0, 0, 1}, rarp)), g.send(frame(g.mac, experimental))); err != nil {
			t.Fatal(err)
		}
	}
	captureFrames(t, n.bridge, send, func(frame []byte) bool {
		kind := binary.BigEndian.Uint16(frame[12:])
		if kind == rarp {
			t.Error("the bridge has got it")
		}
		return kind == experimental
	})
}

// TestMembershipsStayOutside: the guest is not woken by who joins a multicast group, whichever classifier the
// kernel has, and gets other frames to groups.
func TestMembershipsStayOutside(t *testing.T) {
	for first, c := range classifiers {
		t.Run(c.kind, func(t *testing.T) {
			n := newBridgeNode(t)
			n.kind.Store(int32(first))
			a := n.setup(t, n.pod(1))
			defer n.teardown(t, n.pod(1).ID)
			tap := openTap(t, n, a)
			defer tap.Close()
			listeners, all := netip.MustParseAddr("ff02::16"), netip.MustParseAddr("ff02::1")
			routers, last := netip.MustParseAddr("224.0.0.22"), netip.MustParseAddr("224.0.0.251")
			for _, dst := range []netip.Addr{listeners, routers, all, last} {
				flood(t, n.bridge, dst)
			}
			got := map[netip.Addr]bool{}
			for buf := make([]byte, 2000); !got[last]; {
				if err := tap.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
					t.Fatal(err)
				}
				size, err := tap.Read(buf)
				if err != nil {
					t.Fatalf("after frames to %v: %v", got, err)
				}
				got[destination(buf[vnetHeader:size])] = true
			}
			if got[listeners] || got[routers] || !got[all] {
				t.Errorf("frames came to %v, want those to %s and %s, and none to %s and %s", got, all, last, listeners, routers)
			}
		})
	}
}

// flood sends an IP packet to a group out of all ports of a bridge.
func flood(t *testing.T, bridge string, dst netip.Addr) {
	t.Helper()
	i, err := net.InterfaceByName(bridge)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	const payload, none = 46, 59 // bytes, and the protocol that means no more headers
	addr := dst.AsSlice()
	mac, kind := []byte{0x33, 0x33, 0, 0, 0, addr[len(addr)-1]}, []byte{0x86, 0xdd}
	packet := make([]byte, 40)
	packet[0], packet[5], packet[6], packet[7] = 6<<4, payload, none, 1
	if dst.Is4() {
		mac, kind = []byte{0x01, 0, 0x5e, 0, 0, addr[3]}, []byte{0x08, 0x00}
		packet = make([]byte, 20)
		packet[0], packet[3], packet[8], packet[9] = 4<<4|5, 20+payload, 1, none
	}
	copy(packet[len(packet)-len(addr):], addr)
	if dst.Is4() {
		setChecksum(packet, 10, 0)
	}
	frame := slices.Concat(mac, i.HardwareAddr, kind, packet, make([]byte, payload))
	if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: i.Index}); err != nil {
		t.Fatal(err)
	}
}

// destination is the IP address that a frame is for; the zero one for frames of other protocols.
func destination(frame []byte) netip.Addr {
	packet := frame[etherHeader:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		return netip.AddrFrom4([4]byte(packet[16:20]))
	case unix.ETH_P_IPV6:
		return netip.AddrFrom16([16]byte(packet[24:40]))
	}
	return netip.Addr{}
}
