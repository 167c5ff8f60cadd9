package guest

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNetwork gives the test a network of its own. Its thread ends with the test.
func inNetwork(t *testing.T) *cards {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	c, err := newCards()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestNetwork(t *testing.T) {
	cards := inNetwork(t)
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	plug := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "ens3", HardwareAddr: mac}, PeerName: "peer"}
	plugged := make(chan error, 1)
	handle, err := netlink.NewHandle() // of this network, wherever it is used
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	time.AfterFunc(50*time.Millisecond, func() { plugged <- handle.LinkAdd(plug) })
	err = cards.configure(t.Context(), &agent.NetworkRequest{Interfaces: []*agent.Interface{{
		Name: "eth0", Mac: mac.String(), Mtu: 1400, Addresses: []string{"10.1.2.3/24", "fd00::3/64"},
		Routes: []*agent.Route{
			{Destination: "169.254.1.1/32", Scope: uint32(netlink.SCOPE_LINK)},
			{Destination: "0.0.0.0/0", Gateway: "169.254.1.1", Source: "10.1.2.3", Metric: 5},
			{Destination: "::/0", Gateway: "fd00::1", Mtu: 1300},
			{Destination: "198.51.100.0/24", Gateway: "169.254.1.1", Mtu: 1350, Advmss: 1200},
			{Destination: "203.0.113.0/24", Type: unix.RTN_BLACKHOLE},
			{Destination: "2001:db8:1::/48", Type: unix.RTN_UNREACHABLE, Metric: 7},
		},
		Neighbours: []*agent.Neighbour{{Address: "169.254.1.1", Mac: "02:00:00:00:00:01"}},
	}}})
	if err != nil {
		t.Fatal(err, <-plugged)
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if a := link.Attrs(); a.MTU != 1400 || a.Flags&net.FlagUp == 0 {
		t.Errorf("link: %+v", a)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, a := range addrs {
		if s := a.IPNet.String(); s == "10.1.2.3/24" || s == "fd00::3/64" && a.Flags&unix.IFA_F_TENTATIVE == 0 {
			found++
		}
	}
	if found != 2 {
		t.Errorf("addresses: %v", addrs)
	}
	for to, via := range map[string]string{"8.8.8.8": "169.254.1.1", "2001:db8::1": "fd00::1"} {
		routes, err := netlink.RouteGet(net.ParseIP(to))
		if err != nil || len(routes) != 1 || routes[0].Gw.String() != via {
			t.Errorf("route to %s: %v, %v", to, routes, err)
		}
	}
	all, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	like := map[string]netlink.Route{}
	for _, r := range all {
		like[r.Dst.String()] = r
	}
	if r := like["198.51.100.0/24"]; r.MTU != 1350 || r.AdvMSS != 1200 || like["::/0"].MTU != 1300 || like["0.0.0.0/0"].MTU != 0 {
		t.Errorf("MTUs are not the routes' own: %v", all)
	}
	if like["203.0.113.0/24"].Type != unix.RTN_BLACKHOLE || like["2001:db8:1::/48"].Type != unix.RTN_UNREACHABLE {
		t.Errorf("routes that refuse packets: %v", all)
	}
	neighbours, err := netlink.NeighList(link.Attrs().Index, netlink.FAMILY_V4)
	if err != nil || len(neighbours) != 1 || neighbours[0].State != netlink.NUD_PERMANENT {
		t.Errorf("neighbours: %v, %v", neighbours, err)
	}
}

// TestCard: a card that is there from the beginning becomes a pod's.
func TestCard(t *testing.T) {
	cards := inNetwork(t)
	const from = "02:ca:15:50:00:01"
	first, err := net.ParseMAC(from)
	if err != nil {
		t.Fatal(err)
	}
	peer := net.HardwareAddr{2, 0, 0, 0, 0, 8}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "ens3", HardwareAddr: first}, PeerName: "peer", PeerHardwareAddr: peer}); err != nil {
		t.Fatal(err)
	}
	other, err := netlink.LinkByName("peer")
	if err == nil {
		err = netlink.LinkSetUp(other)
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // a call that is repeated
		if err := cards.prepare(t.Context(), from); err != nil {
			t.Fatal(err)
		}
	}
	if err := cards.rehearse(t.Context()); err != nil {
		t.Fatal(err)
	}
	if routes, err := netlink.RouteList(nil, netlink.FAMILY_V4); err != nil || len(routes) != 0 {
		t.Errorf("a rehearsal leaves the routes %v, %v", routes, err)
	}
	if link, addrs := card(t, cardName); link.Attrs().Flags&net.FlagUp == 0 || link.Attrs().HardwareAddr.String() != from || len(addrs) != 0 {
		t.Errorf("prepared: %+v with %v, want it up and silent", link.Attrs(), addrs)
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	const name = "net7"
	err = cards.configure(t.Context(), &agent.NetworkRequest{Interfaces: []*agent.Interface{{
		Name: name, Mac: mac.String(), CardMac: from, Mtu: 1400, Addresses: []string{"10.1.2.3/24"},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	link, addrs := card(t, name)
	if a := link.Attrs(); a.MTU != 1400 || a.Flags&net.FlagUp == 0 || a.HardwareAddr.String() != mac.String() {
		t.Errorf("card: %+v", a)
	}
	var all []string
	for _, a := range addrs {
		all = append(all, a.IPNet.String())
	}
	slices.Sort(all)
	if want := []string{"10.1.2.3/24", "fe80::ff:fe00:9/64"}; !slices.Equal(all, want) {
		t.Errorf("addresses %v, want %v: those given, and one of its own address", all, want)
	}
	if mode, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name + "/addr_gen_mode"); err != nil || string(mode) != "0\n" {
		t.Errorf("its link's next address comes by mode %q, %v", mode, err)
	}
}

// TestSmallMTU: there is no IPv6 where packets are too small for it.
func TestSmallMTU(t *testing.T) {
	cards := inNetwork(t)
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "ens3", HardwareAddr: mac}, PeerName: "peer"}); err != nil {
		t.Fatal(err)
	}
	if err := cards.configure(t.Context(), &agent.NetworkRequest{Interfaces: []*agent.Interface{{
		Name: cardName, Mac: mac.String(), Mtu: 1000, Addresses: []string{"10.1.2.3/24"},
	}}}); err != nil {
		t.Fatal(err)
	}
	if link, addrs := card(t, cardName); link.Attrs().MTU != 1000 || len(addrs) != 1 {
		t.Errorf("card: %+v with %v", link.Attrs(), addrs)
	}
}

// card is one and its addresses.
func card(t *testing.T, name string) (netlink.Link, []netlink.Addr) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	return link, addrs
}

func TestNetworkFails(t *testing.T) {
	cards := inNetwork(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	request := func(i *agent.Interface) *agent.NetworkRequest {
		return &agent.NetworkRequest{Interfaces: []*agent.Interface{i}}
	}
	err := cards.configure(ctx, request(&agent.Interface{Name: "eth0", Mac: "02:00:00:00:00:07"}))
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "eth0 (02:00:00:00:00:07)") {
		t.Errorf("no card: %v", err)
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "ens3", HardwareAddr: mac}, PeerName: "peer"}); err != nil {
		t.Fatal(err)
	}
	for name, i := range map[string]*agent.Interface{
		"mac": {Name: "eth0", Mac: "x"}, "card": {Mac: mac.String(), CardMac: "x"}, "address": {Addresses: []string{"10.0.0.1"}},
		"other version": {Routes: []*agent.Route{{Destination: "0.0.0.0/0", Gateway: "fd00::1"}}},
		"route":         {Routes: []*agent.Route{{Destination: "x"}}}, "gateway": {Routes: []*agent.Route{{Destination: "0.0.0.0/0", Gateway: "x"}}},
		"neighbour": {Neighbours: []*agent.Neighbour{{Address: "10.0.0.1", Mac: "x"}}},
	} {
		if i.Mac == "" {
			i.Name, i.Mac = "eth0", mac.String()
		}
		if err := cards.configure(t.Context(), request(i)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	err = cards.configure(t.Context(), request(&agent.Interface{
		Name: "eth0", Mac: mac.String(), Routes: []*agent.Route{{Destination: "0.0.0.0/0", Gateway: "203.0.113.1"}},
	}))
	if !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("a gateway that can't be reached: %v", err)
	}
}
