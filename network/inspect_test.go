package network

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNamespace runs do in a namespace of its own, on a thread that is not the test's.
func inNamespace(t *testing.T, do func(h *netlink.Handle) error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ns")
	if err := createNetNS(path, empty); err != nil {
		t.Fatal(err)
	}
	defer deleteNetNS(path)
	err := inNetNS(path, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return do(h)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// withCard runs do in a namespace that has a card eth0, which is up.
func withCard(t *testing.T, do func(h *netlink.Handle, eth0 netlink.Link) error) {
	t.Helper()
	inNamespace(t, func(h *netlink.Handle) error {
		mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
		err := h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", HardwareAddr: mac, MTU: 1420}, PeerName: "peer"})
		if err != nil {
			return err
		}
		link, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(h.LinkSetUp(link), do(h, link))
	})
}

// inspected is what a guest is told of the card, and of routes over none.
func inspected(h *netlink.Handle, link netlink.Link) (Interface, error) {
	routes, refusing, err := podRoutes(h, []netlink.Link{link})
	if err != nil {
		return Interface{}, err
	}
	i, err := inspect(h, link, routes, new(types100.Result))
	i.Routes = append(i.Routes, refusing...)
	return i, err
}

// What some plugins do behind the result's back: a gateway off the subnet, permanent neighbours, an MTU of a
// route's own.
func TestInspectReadsTheKernel(t *testing.T) {
	var got Interface
	withCard(t, func(h *netlink.Handle, link netlink.Link) error {
		gw := net.IPv4(169, 254, 1, 1)
		addr, err := netlink.ParseAddr("192.0.2.7/32")
		if err != nil {
			return err
		}
		index := link.Attrs().Index
		return errors.Join(
			h.AddrAdd(link, addr),
			h.RouteAdd(&netlink.Route{LinkIndex: index, Gw: gw, Flags: unix.RTNH_F_ONLINK, Priority: 50, MTU: 1370, AdvMSS: 1300}),
			h.RouteAdd(&netlink.Route{Type: unix.RTN_BLACKHOLE, Dst: host(net.IPv4(198, 51, 100, 1))}),
			h.RouteAdd(&netlink.Route{Type: unix.RTN_UNREACHABLE, Dst: host(net.ParseIP("2001:db8::1"))}),
			h.NeighAdd(&netlink.Neigh{LinkIndex: index, State: netlink.NUD_PERMANENT, IP: gw, HardwareAddr: net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}}),
			func() (err error) { got, err = inspected(h, link); return err }(),
		)
	})
	want := Interface{
		Name: "eth0", MAC: "02:00:00:00:00:01", MTU: 1420,
		Addresses: []string{"192.0.2.7/32"},
		Routes: []Route{
			{Destination: "169.254.1.1/32", Scope: unix.RT_SCOPE_LINK},
			{Destination: "0.0.0.0/0", Gateway: "169.254.1.1", Metric: 50, MTU: 1370, AdvMSS: 1300},
			{Destination: "198.51.100.1/32", Type: unix.RTN_BLACKHOLE},
			{Destination: "2001:db8::1/128", Metric: 1024, Type: unix.RTN_UNREACHABLE},
		},
		Neighbours: []Neighbour{{Address: "169.254.1.1", MAC: "ee:ee:ee:ee:ee:ee"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v, want\n%+v", got, want)
	}
}

// A route that a guest can't have is told, and not left out.
func TestRoutesThatNoGuestCanHave(t *testing.T) {
	withCard(t, func(h *netlink.Handle, link netlink.Link) error {
		hop := func(last byte) *netlink.NexthopInfo {
			return &netlink.NexthopInfo{LinkIndex: link.Attrs().Index, Gw: net.IPv4(192, 0, 2, last), Flags: unix.RTNH_F_ONLINK}
		}
		peer, err := h.LinkByName("peer")
		if err == nil {
			err = h.LinkSetUp(peer)
		}
		if err != nil {
			return err
		}
		for want, route := range map[string]netlink.Route{
			"several gateways":        {Dst: host(net.IPv4(198, 51, 100, 1)), MultiPath: []*netlink.NexthopInfo{hop(1), hop(2)}},
			"of type 9":               {Dst: host(net.IPv4(198, 51, 100, 1)), Type: unix.RTN_THROW},
			"none of the pod's cards": {Dst: host(net.IPv4(198, 51, 100, 1)), LinkIndex: peer.Attrs().Index, Scope: unix.RT_SCOPE_LINK},
			"type of service":         {Dst: host(net.IPv4(198, 51, 100, 1)), LinkIndex: link.Attrs().Index, Scope: unix.RT_SCOPE_LINK, Tos: 8},
		} {
			if err := h.RouteAdd(&route); err != nil {
				return fmt.Errorf("%s: %w", want, err)
			}
			_, err := inspected(h, link)
			if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "198.51.100.1/32") {
				t.Errorf("%v, want %q in it", err, want)
			}
			if err := h.RouteDel(&route); err != nil {
				return fmt.Errorf("%s: %w", want, err)
			}
		}
		return nil
	})
}

func TestRulesAreRefused(t *testing.T) {
	withCard(t, func(h *netlink.Handle, _ netlink.Link) error {
		if err := checkRules(h); err != nil {
			t.Errorf("the rules that every namespace has: %v", err)
		}
		for _, src := range []string{"192.0.2.7", "2001:db8::7"} {
			rule := netlink.NewRule()
			rule.Src, rule.Table, rule.Priority = host(net.ParseIP(src)), 100, 100
			if rule.Family = netlink.FAMILY_V4; strings.Contains(src, ":") {
				rule.Family = netlink.FAMILY_V6
			}
			if err := h.RuleAdd(rule); err != nil {
				return err
			}
			if err := checkRules(h); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), src) || !strings.Contains(err.Error(), "table 100") {
				t.Errorf("a rule of its own: %v", err)
			}
			if err := h.RuleDel(rule); err != nil {
				return err
			}
		}
		rule := netlink.NewRule() // of no table
		rule.Family, rule.Goto, rule.Priority = netlink.FAMILY_V4, 32766, 501
		if err := h.RuleAdd(rule); err != nil {
			return err
		}
		if err := checkRules(h); !errdefs.IsNotImplemented(err) {
			t.Errorf("a rule that names no table: %v", err)
		}
		return nil
	})
}

// TestSysctlsOfTuning: sysctls of the namespace are the guest's.
func TestSysctlsOfTuning(t *testing.T) {
	n := newBridgeNode(t, map[string]any{"type": "tuning", "sysctl": map[string]string{
		"net.core.somaxconn": "512", "net/ipv4/conf/all/arp_ignore": "1", "net.ipv4.conf.IFNAME.arp_filter": "1",
	}})
	got := n.setup(t, n.pod(1)).Sysctls
	n.teardown(t, n.pod(1).ID)
	want := map[string]string{"net.core.somaxconn": "512", "net.ipv4.conf.all.arp_ignore": "1", "net.ipv4.conf.eth0.arp_filter": "1"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("sysctls %v, want %v", got, want)
	}
}

func TestPodWithRulesIsRefused(t *testing.T) {
	n := newBridgeNode(t, map[string]any{"type": "sbr"})
	if _, err := n.Setup(t.Context(), n.pod(1)); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "routing rule") {
		t.Errorf("setup: %v, want the rule", err)
	}
	n.wantNothingLeft(t)
}
