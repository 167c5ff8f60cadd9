package network

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// guest stands for a VM on a tap: it answers ARP, neighbour solicitations and pings for its
// addresses, as frames behind a virtio-net header.
type guest struct {
	tap   *os.File
	mac   net.HardwareAddr
	addrs []netip.Addr
	mute  atomic.Bool // takes frames and answers none
	pings atomic.Int32
	// syn has the destination port of each TCP SYN and each UDP datagram to it, echo the source of each echo reply.
	syn  chan uint16
	echo chan netip.Addr
	arp  chan net.HardwareAddr // senders of ARP replies
}

const (
	vnetHeader  = 10
	etherHeader = 14
)

// newGuest attaches a guest to the first interface and runs it until the test ends.
func newGuest(t *testing.T, n *node, a *Attachment) *guest {
	t.Helper()
	return newGuestAt(t, openTap(t, n, a), a)
}

// newGuestAt runs a guest at the first interface's tap.
func newGuestAt(t *testing.T, tap *os.File, a *Attachment) *guest {
	t.Helper()
	mac, err := net.ParseMAC(a.Interfaces[0].MAC)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{tap: tap, mac: mac, syn: make(chan uint16, 64), echo: make(chan netip.Addr, 64), arp: make(chan net.HardwareAddr, 64)}
	for _, cidr := range a.Interfaces[0].Addresses {
		g.addrs = append(g.addrs, netip.MustParsePrefix(cidr).Addr())
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := g.run(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("guest: %v", err)
		}
	}()
	t.Cleanup(func() {
		g.tap.Close()
		<-done
	})
	return g
}

// openTap opens the first interface's tap and returns when it carries frames, which the kernel sees
// to in the background.
func openTap(t *testing.T, n *node, a *Attachment) *os.File {
	t.Helper()
	ns, err := netns.GetFromPath(a.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	done, updates := make(chan struct{}), make(chan netlink.LinkUpdate, 16)
	defer close(done)
	if err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{Namespace: &ns, ListExisting: true}); err != nil {
		t.Fatal(err)
	}
	f, err := n.OpenTap(a, 0)
	if err != nil {
		t.Fatal(err)
	}
	for {
		u := receive(t, updates)
		if u.Attrs().Name == a.Interfaces[0].Tap && u.Attrs().OperState == netlink.OperUp {
			return f
		}
	}
}

func (g *guest) run() error {
	buf := make([]byte, 1<<16)
	for {
		n, err := g.tap.Read(buf)
		if err != nil {
			return err
		}
		if n < vnetHeader+etherHeader {
			continue
		}
		if reply := g.answer(buf[vnetHeader:n]); reply != nil && !g.mute.Load() {
			if err := g.send(reply); err != nil {
				return err
			}
		}
	}
}

func (g *guest) send(frame []byte) error {
	_, err := g.tap.Write(append(make([]byte, vnetHeader), frame...))
	return err
}

// answer turns a frame into its answer, in place, or returns nil.
func (g *guest) answer(frame []byte) []byte {
	body := frame[etherHeader:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case 0x0806:
		return g.answerARP(frame, body)
	case 0x0800:
		return g.answerIPv4(frame, body)
	case 0x86dd:
		return g.answerIPv6(frame, body)
	}
	return nil
}

func (g *guest) has(ip []byte) bool {
	addr, ok := netip.AddrFromSlice(ip)
	for _, a := range g.addrs {
		if ok && a == addr {
			return true
		}
	}
	return false
}

func (g *guest) back(frame []byte) []byte {
	copy(frame[0:6], frame[6:12])
	copy(frame[6:12], g.mac)
	return frame
}

func (g *guest) answerARP(frame, arp []byte) []byte {
	if binary.BigEndian.Uint16(arp[6:]) == 2 {
		g.arp <- net.HardwareAddr(append([]byte(nil), arp[8:14]...))
		return nil
	}
	if !g.has(arp[24:28]) {
		return nil
	}
	target := append([]byte(nil), arp[24:28]...)
	binary.BigEndian.PutUint16(arp[6:], 2)
	copy(arp[18:28], arp[8:18])
	copy(arp[8:14], g.mac)
	copy(arp[14:18], target)
	return g.back(frame[:etherHeader+28])
}

func (g *guest) answerIPv4(frame, ip []byte) []byte {
	ip = ip[:binary.BigEndian.Uint16(ip[2:])]
	header := int(ip[0]&15) * 4
	if !g.has(ip[16:20]) {
		return nil
	}
	payload := ip[header:]
	switch ip[9] {
	case 17:
		g.syn <- binary.BigEndian.Uint16(payload[2:])
	case 6:
		if payload[13]&2 != 0 {
			g.syn <- binary.BigEndian.Uint16(payload[2:])
		}
	case 1:
		switch payload[0] {
		case 0:
			src, _ := netip.AddrFromSlice(ip[12:16])
			g.echo <- src
		case 8:
			g.pings.Add(1)
			var src [4]byte
			copy(src[:], ip[12:16])
			copy(ip[12:16], ip[16:20])
			copy(ip[16:20], src[:])
			payload[0] = 0
			setChecksum(payload, 2, 0)
			return g.back(frame[:etherHeader+len(ip)])
		}
	}
	return nil
}

func (g *guest) answerIPv6(frame, ip []byte) []byte {
	ip = ip[:40+binary.BigEndian.Uint16(ip[4:])]
	payload := ip[40:]
	if ip[6] != 58 || len(payload) < 8 {
		return nil
	}
	switch payload[0] {
	case 128:
		if !g.has(ip[24:40]) {
			return nil
		}
		g.pings.Add(1)
		var src [16]byte
		copy(src[:], ip[8:24])
		copy(ip[8:24], ip[24:40])
		copy(ip[24:40], src[:])
		payload[0] = 129
	case 135: // neighbour solicitation -> advertisement: solicited, override
		if !g.has(payload[8:24]) || ip[8] == 0 {
			return nil
		}
		copy(ip[24:40], ip[8:24])
		copy(ip[8:24], payload[8:24])
		payload[0] = 136
		binary.BigEndian.PutUint32(payload[4:], 0x60000000)
		payload = append(payload[:24], 2, 1)
		payload = append(payload, g.mac...)
		ip = ip[:40+len(payload)]
		binary.BigEndian.PutUint16(ip[4:], uint16(len(payload)))
	default:
		return nil
	}
	setChecksum(payload, 2, sum(ip[8:40])+uint32(len(payload))+58)
	return g.back(frame[:etherHeader+len(ip)])
}

// ping sends an IPv4 echo request to a neighbour with that MAC.
func (g *guest) ping(t *testing.T, to netip.Addr, mac net.HardwareAddr) {
	t.Helper()
	frame := make([]byte, etherHeader+28)
	copy(frame, mac)
	copy(frame[6:], g.mac)
	frame[12] = 8
	ip := frame[etherHeader:]
	ip[0], ip[3], ip[8], ip[9] = 0x45, 28, 64, 1
	copy(ip[12:], g.addrs[0].AsSlice())
	copy(ip[16:], to.AsSlice())
	setChecksum(ip[:20], 10, 0)
	ip[20] = 8
	setChecksum(ip[20:], 2, 0)
	if err := g.send(frame); err != nil {
		t.Fatal(err)
	}
}

// who asks for the MAC of a neighbour's IPv4 address.
func (g *guest) who(t *testing.T, has netip.Addr) {
	t.Helper()
	frame := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	frame = append(frame, g.mac...)
	frame = append(frame, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	frame = append(frame, g.mac...)
	frame = append(frame, g.addrs[0].AsSlice()...)
	frame = append(frame, 0, 0, 0, 0, 0, 0)
	frame = append(frame, has.AsSlice()...)
	if err := g.send(frame); err != nil {
		t.Fatal(err)
	}
}

func sum(b []byte) (s uint32) {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	return s
}

// setChecksum writes the Internet checksum of b, and of what start sums up, at b[at].
func setChecksum(b []byte, at int, start uint32) {
	b[at], b[at+1] = 0, 0
	s := sum(b) + start
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	binary.BigEndian.PutUint16(b[at:], ^uint16(s))
}
