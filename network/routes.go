package network

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// podRoutes lists the routes of the thread's namespace that the plugins made: those over links, and those over
// none, which refuse or drop packets. What a guest can't be given is an error.
func podRoutes(h *netlink.Handle, links []netlink.Link) (all []netlink.Route, refusing []Route, err error) {
	listed, err := dump(func() ([]netlink.Route, error) { return h.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range listed {
		over := slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Attrs().Index == r.LinkIndex })
		switch {
		case r.Protocol == unix.RTPROT_RA || !over && r.Protocol == unix.RTPROT_KERNEL: // the latter of loopback, or a part of a card
			continue
		case len(r.MultiPath) > 0:
			err = errors.New("has several gateways, where one is needed")
		case r.Gw == nil && r.Via != nil:
			err = fmt.Errorf("is through a gateway of another address family (%v)", r.Via)
		case r.Encap != nil || r.Tos != 0:
			err = fmt.Errorf("encapsulates packets (%v), or is for a type of service (%d) only", r.Encap, r.Tos)
		case slices.Contains([]int{unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT}, r.Type):
			refusing = append(refusing, guestRoute(r))
			continue
		case r.Type != unix.RTN_UNICAST:
			err = fmt.Errorf("is of type %d (rtnetlink(7))", r.Type)
		case !over:
			err = fmt.Errorf("is over interface %d, which is none of the pod's cards", r.LinkIndex)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("route to %s %w; a pod's VM can't have it: %w", target(r), err, errdefs.ErrNotImplemented)
		}
		all = append(all, r)
	}
	return all, refusing, nil
}

// checkRules refuses a pod in whose namespace a plugin has made rules of which table of routes is for what, as
// source-based routing has them: a guest has one table.
func checkRules(h *netlink.Handle) error {
	rules, err := dump(func() ([]netlink.Rule, error) { return h.RuleList(netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	// Those that every namespace has, by priority.
	tables := map[int]int{0: unix.RT_TABLE_LOCAL, 32766: unix.RT_TABLE_MAIN, 32767: unix.RT_TABLE_DEFAULT}
	for _, r := range rules {
		table, usual := tables[r.Priority]
		if (r.Family == netlink.FAMILY_V4 || r.Family == netlink.FAMILY_V6) && (!usual || r.Table != table) {
			return fmt.Errorf("routing rule of the pod's namespace (%v): a pod's VM has the main table of routes only; "+
				"have the network do without the plugin that made it, as sbr does, or run such pods by another runtime: %w", r, errdefs.ErrNotImplemented)
		}
	}
	return nil
}

// over are the routes over a link.
func over(link netlink.Link, all []netlink.Route) (routes []netlink.Route) {
	for _, r := range all {
		if r.LinkIndex == link.Attrs().Index {
			routes = append(routes, r)
		}
	}
	return routes
}

// guestRoutes are the routes that the guest does not get with its addresses, those on the link
// first: the others' gateways may need them.
func guestRoutes(addrs []netlink.Addr, routes []netlink.Route) []Route {
	var onLink, via []Route
	for _, r := range routes {
		if isConnected(r) && automatic(r, addrs) {
			continue
		}
		gw := r.Gw
		route := guestRoute(r)
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
	return append(onLink, via...)
}

// guestRoute is a route without its gateway.
func guestRoute(r netlink.Route) Route {
	route := Route{Destination: target(r).String(), Metric: r.Priority, Scope: int(r.Scope), MTU: r.MTU, AdvMSS: r.AdvMSS}
	if r.Type != unix.RTN_UNICAST {
		route.Type = r.Type
	}
	if r.Src != nil {
		route.Source = r.Src.String()
	}
	return route
}

func target(r netlink.Route) *net.IPNet {
	switch {
	case r.Dst != nil:
		return r.Dst
	case r.Family == netlink.FAMILY_V6:
		return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
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

func host(ip net.IP) *net.IPNet {
	if v4 := ip.To4(); v4 != nil {
		return &net.IPNet{IP: v4, Mask: net.CIDRMask(32, 32)}
	}
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(128, 128)}
}
