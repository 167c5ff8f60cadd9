package network

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/containerd/errdefs"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inspect reads from the kernel what the guest's card must be like. The kernel knows more than the
// plugins' result: routes to gateways that are off the subnet, neighbours, interfaces of the routes.
func inspect(h *netlink.Handle, link netlink.Link, result *types100.Result) (Interface, error) {
	a := link.Attrs()
	if len(a.HardwareAddr) != 6 {
		return Interface{}, fmt.Errorf("a %s without a MAC address can't be a virtual machine's card: %w", link.Type(), errdefs.ErrNotImplemented)
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return h.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return Interface{}, fmt.Errorf("list addresses: %w", err)
	}
	routes, err := dump(func() ([]netlink.Route, error) { return h.RouteList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return Interface{}, fmt.Errorf("list routes: %w", err)
	}
	neighs, err := dump(func() ([]netlink.Neigh, error) { return h.NeighList(a.Index, netlink.FAMILY_ALL) })
	if err != nil {
		return Interface{}, fmt.Errorf("list neighbours: %w", err)
	}
	guest, err := guestRoutes(addrs, routes)
	if err != nil {
		return Interface{}, err
	}
	return Interface{
		Name: a.Name, MAC: a.HardwareAddr.String(), MTU: a.MTU,
		Addresses:  guestAddresses(addrs, routes, a.HardwareAddr, result),
		Routes:     guest,
		Neighbours: guestNeighbours(neighs),
	}, nil
}

// dump repeats a netlink listing that a change interrupted.
func dump[T any](list func() ([]T, error)) (all []T, err error) {
	for range 5 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// guestAddresses are the interface's addresses, those of the result first and in its order, without
// the link-local one that the guest derives from the MAC by itself.
//
// A kernel adds the route to an address's subnet with the address. Where a plugin has removed that
// route (ptp sends the subnet through the gateway) the guest gets the address alone, as /32 or /128.
func guestAddresses(addrs []netlink.Addr, routes []netlink.Route, mac net.HardwareAddr, result *types100.Result) []string {
	rank := func(ip net.IP) int {
		i := slices.IndexFunc(result.IPs, func(c *types100.IPConfig) bool { return c.Address.IP.Equal(ip) })
		if i < 0 {
			return len(result.IPs)
		}
		return i
	}
	slices.SortStableFunc(addrs, func(a, b netlink.Addr) int { return cmp.Compare(rank(a.IP), rank(b.IP)) })
	var cidrs []string
	for _, a := range addrs {
		if a.IP.IsLinkLocalUnicast() && a.IP.Equal(eui64(mac)) {
			continue
		}
		mask := a.Mask
		if !slices.ContainsFunc(routes, func(r netlink.Route) bool { return isConnected(r) && sameNet(r.Dst, subnet(a)) }) {
			mask = net.CIDRMask(8*len(mask), 8*len(mask))
		}
		cidrs = append(cidrs, (&net.IPNet{IP: a.IP, Mask: mask}).String())
	}
	return cidrs
}

// guestRoutes are the routes that the guest does not get with its addresses, those on the link
// first: the others' gateways may need them.
func guestRoutes(addrs []netlink.Addr, routes []netlink.Route) ([]Route, error) {
	var onLink, via []Route
	for _, r := range routes {
		if r.Type != unix.RTN_UNICAST || r.Protocol == unix.RTPROT_RA || (isConnected(r) && automatic(r, addrs)) {
			continue
		}
		dst := r.Dst
		if dst == nil {
			dst = &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
			if r.Family == netlink.FAMILY_V6 {
				dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
			}
		}
		gw := r.Gw
		if gw == nil && r.Via != nil {
			return nil, fmt.Errorf("route to %s through a gateway of another address family (%v): %w", dst, r.Via, errdefs.ErrNotImplemented)
		}
		route := Route{Destination: dst.String(), Metric: r.Priority, Scope: int(r.Scope)}
		if r.Src != nil {
			route.Source = r.Src.String()
		}
		if gw == nil {
			onLink = append(onLink, route)
			continue
		}
		route.Gateway = gw.String()
		via = append(via, route)
		// The flag says that the gateway is there though no route says so; a route to it does, too.
		if r.Flags&unix.RTNH_F_ONLINK != 0 && (gw.To4() != nil || !gw.IsLinkLocalUnicast()) {
			onLink = append(onLink, Route{Destination: host(gw).String(), Scope: unix.RT_SCOPE_LINK})
		}
	}
	return append(onLink, via...), nil
}

// guestNeighbours are the entries a plugin made by hand.
func guestNeighbours(neighs []netlink.Neigh) []Neighbour {
	var out []Neighbour
	for _, n := range neighs {
		if n.State&netlink.NUD_PERMANENT != 0 && len(n.HardwareAddr) == 6 && n.IP != nil && !n.IP.IsMulticast() {
			out = append(out, Neighbour{Address: n.IP.String(), MAC: n.HardwareAddr.String()})
		}
	}
	return out
}

// isConnected tells whether the route is one to a subnet on the link.
func isConnected(r netlink.Route) bool {
	return r.Dst != nil && r.Gw == nil && r.Via == nil
}

// automatic tells whether the guest's kernel makes the connected route by itself: for the subnet of
// one of its addresses, and IPv6's for link-local and multicast.
func automatic(r netlink.Route, addrs []netlink.Addr) bool {
	if r.Dst.IP.To4() == nil && (r.Dst.IP.IsLinkLocalUnicast() || r.Dst.IP.IsMulticast()) {
		return true
	}
	return r.Protocol == unix.RTPROT_KERNEL &&
		slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return sameNet(r.Dst, subnet(a)) })
}

func subnet(a netlink.Addr) *net.IPNet {
	return &net.IPNet{IP: a.IP.Mask(a.Mask), Mask: a.Mask}
}

func sameNet(a, b *net.IPNet) bool {
	return a.IP.Equal(b.IP) && bytes.Equal(a.Mask, b.Mask)
}

func host(ip net.IP) *net.IPNet {
	if v4 := ip.To4(); v4 != nil {
		return &net.IPNet{IP: v4, Mask: net.CIDRMask(32, 32)}
	}
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(128, 128)}
}

// eui64 is the IPv6 link-local address that a kernel derives from a MAC (RFC 4291, appendix A).
func eui64(mac net.HardwareAddr) net.IP {
	return net.IP{0xfe, 0x80, 7: 0, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]}
}

// resultDNS is what the plugins say of name servers.
func resultDNS(result *types100.Result) DNS {
	d := DNS{Servers: result.DNS.Nameservers, Searches: result.DNS.Search, Options: result.DNS.Options}
	if len(d.Searches) == 0 && result.DNS.Domain != "" {
		d.Searches = []string{result.DNS.Domain}
	}
	return d
}
