package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
)

// add makes links that are up.
func add(h *netlink.Handle, links ...netlink.Link) error {
	for _, l := range links {
		if err := errors.Join(h.LinkAdd(l), h.LinkSetUp(l)); err != nil {
			return fmt.Errorf("%s %s: %w", l.Type(), l.Attrs().Name, err)
		}
	}
	return nil
}

func like(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

// Whatever a plugin has made is a card, of whatever type, but for what another interface is made of.
func TestEveryInterfaceIsACard(t *testing.T) {
	var names []string
	inNamespace(t, func(h *netlink.Handle) error {
		bridge, part := &netlink.Bridge{LinkAttrs: like("net3")}, &netlink.Ifb{LinkAttrs: like("part")}
		err := errors.Join(add(h,
			&netlink.Ifb{LinkAttrs: like("net1")}, &netlink.Tuntap{LinkAttrs: like("net2"), Mode: netlink.TUNTAP_MODE_TAP},
			&netlink.Tuntap{LinkAttrs: like(tapName(0)), Mode: netlink.TUNTAP_MODE_TAP},
			bridge, part, &netlink.Ifb{LinkAttrs: like("eth0")},
		), h.LinkAdd(&netlink.Ifb{LinkAttrs: like("down")}), h.LinkSetMaster(part, bridge))
		if err != nil {
			return err
		}
		links, err := podLinks(h, "eth0")
		if err != nil {
			return err
		}
		_, _, err = podRoutes(h, links)
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		return err
	})
	if want := []string{"eth0", "net1", "net2", "net3"}; !slices.Equal(names, want) {
		t.Errorf("cards %v, want %v", names, want)
	}
}

func TestInterfacesThatAreNoCards(t *testing.T) {
	inNamespace(t, func(h *netlink.Handle) error {
		eth0, tun := &netlink.Ifb{LinkAttrs: like("eth0")}, &netlink.Tuntap{LinkAttrs: like("net1"), Mode: netlink.TUNTAP_MODE_TUN}
		if err := add(h, eth0, tun); err != nil {
			return err
		}
		if _, err := inspected(h, tun); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "MAC address") {
			t.Errorf("an interface without a MAC address: %v", err)
		}
		above := &netlink.Macvlan{LinkAttrs: like("net2"), Mode: netlink.MACVLAN_MODE_BRIDGE}
		above.ParentIndex = eth0.Index
		if err := add(h, above); err != nil {
			return err
		}
		if _, err := podLinks(h, "eth0"); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "net2 is on eth0") {
			t.Errorf("an interface on another: %v", err)
		}
		eth0.HardwareAddr = make(net.HardwareAddr, 6)
		if _, err := inspected(h, eth0); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "MAC address") {
			t.Errorf("an interface whose MAC address is zero: %v", err)
		}
		return nil
	})
}

// A pod's addresses are its first interface's.
func TestIPs(t *testing.T) {
	a := &Attachment{Interfaces: []Interface{
		{Name: "eth0", Addresses: []string{"192.0.2.7/24", "fe80::7/64", "2001:db8::7/64"}}, {Name: "net1", Addresses: []string{"198.51.100.7/24"}},
	}}
	if got, want := a.IPs(), []string{"192.0.2.7", "2001:db8::7"}; !reflect.DeepEqual(got, want) {
		t.Errorf("addresses %v, want %v", got, want)
	}
	if got := new(Attachment).IPs(); got != nil {
		t.Errorf("addresses %v without an interface", got)
	}
}

// A guest joins multicast groups of which the namespace knows nothing.
func TestMulticastReachesGuestsOfMacvlan(t *testing.T) {
	n := newNode(t)
	master := &netlink.Veth{LinkAttrs: like("mv-node"), PeerName: "mv-wire"}
	wire := &netlink.Veth{LinkAttrs: like("mv-wire")}
	if err := errors.Join(netlink.LinkAdd(master), netlink.LinkSetUp(master), netlink.LinkSetUp(wire)); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(master)
	n.configure(t, map[string]any{"cniVersion": "1.0.0", "name": "macvlan", "plugins": []map[string]any{{
		"type": "macvlan", "master": "mv-node",
		"ipam": map[string]any{"type": "host-local", "dataDir": n.ipamDir(), "subnet": n.subnet4},
	}}})
	a := n.setup(t, n.pod(1))
	defer n.teardown(t, n.pod(1).ID)
	tap := openTap(t, n, a)
	defer tap.Close()
	group := netip.MustParseAddr("239.0.0.77")
	flood(t, "mv-wire", group)
	if err := tap.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, 2000); ; {
		size, err := tap.Read(buf)
		if err != nil {
			t.Fatalf("a frame to %s: %v", group, err)
		}
		if destination(buf[vnetHeader:size]) == group {
			return
		}
	}
}
