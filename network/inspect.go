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
)

// inspect reads from the kernel what the guest's card must be like. The kernel knows more than the
// plugins' result: routes to gateways that are off the subnet, neighbours, interfaces of the routes.
func inspect(h *netlink.Handle, link netlink.Link, all []netlink.Route, result *types100.Result) (Interface, error) {
	a := link.Attrs()
	if len(a.HardwareAddr) != 6 || bytes.Equal(a.HardwareAddr, make([]byte, 6)) {
		return Interface{}, fmt.Errorf("a %s without a MAC address can't be a virtual machine's card, have the network plugin make one with "+
			"(Cilium: datapath mode veth or netkit-l2): %w", link.Type(), errdefs.ErrNotImplemented)
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return h.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return Interface{}, fmt.Errorf("list addresses: %w", err)
	}
	neighs, err := dump(func() ([]netlink.Neigh, error) { return h.NeighList(a.Index, netlink.FAMILY_ALL) })
	if err != nil {
		return Interface{}, fmt.Errorf("list neighbours: %w", err)
	}
	routes := over(link, all)
	return Interface{
		Name: a.Name, MAC: a.HardwareAddr.String(), MTU: a.MTU,
		Addresses:  guestAddresses(addrs, routes, a.HardwareAddr, result),
		Routes:     guestRoutes(addrs, routes),
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

func subnet(a netlink.Addr) *net.IPNet {
	return &net.IPNet{IP: a.IP.Mask(a.Mask), Mask: a.Mask}
}

func sameNet(a, b *net.IPNet) bool {
	return a.IP.Equal(b.IP) && bytes.Equal(a.Mask, b.Mask)
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
