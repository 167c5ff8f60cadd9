package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cards configures the guest's network cards, over sockets to the kernel that a clone has from its template.
// It is done before anything of the pod runs, which could write to them. What is done for every pod goes over
// the plain one: the library takes 64 KiB for each answer, and a clone each page of it from its template.
type cards struct {
	*netlink.Handle
	rt rtnetlink
	// prepared is the card that every pod has, where it was prepared; nil where not.
	prepared netlink.Link
}

// cardAnswer is how long the kernel may take to answer.
const cardAnswer = deviceWait

func newCards() (*cards, error) {
	rt, err := newRTNetlink()
	if err != nil {
		return nil, fmt.Errorf("talk to the kernel about network cards: %w", err)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err == nil {
		if err = h.SetSocketTimeout(cardAnswer); err != nil {
			h.Close()
		}
	}
	if err != nil {
		rt.close()
		return nil, fmt.Errorf("talk to the kernel about network cards: %w", err)
	}
	return &cards{Handle: h, rt: rt}, nil
}

// Close closes the sockets.
func (c *cards) Close() {
	c.Handle.Close()
	c.rt.close()
}

// configure configures the cards of a request, waiting for each to be plugged in.
func (c *cards) configure(ctx context.Context, req *agent.NetworkRequest) error {
	ctx, cancel := context.WithTimeout(ctx, deviceWait)
	defer cancel()
	for _, i := range req.Interfaces {
		if err := c.set(ctx, i); err != nil {
			return fmt.Errorf("network card %s (%s): %w", i.Name, i.Mac, err)
		}
	}
	return nil
}

// cardName is how almost every pod's first interface is called.
const cardName = "eth0"

// prepare does what can be done for a card before it is known whose it will be: it is up, and silent, because
// its address is not its own: with no IP address, not even one of its link, it sends nothing.
func (c *cards) prepare(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, deviceWait)
	defer cancel()
	mac, err := net.ParseMAC(address)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	link, err := c.await(ctx, mac)
	if err != nil {
		return err
	}
	if link, err = c.rename(link, cardName); err != nil {
		return err
	}
	if err := noDiscovery(cardName); err != nil {
		return err
	}
	if err := c.silence(link); err != nil {
		return err
	}
	if err := c.up(link); err != nil {
		return err
	}
	c.prepared, err = c.LinkByIndex(link.Attrs().Index)
	return err
}

// rehearse gives the card that was prepared another MAC address, and addresses and routes of documentation, and
// takes them away again.
func (c *cards) rehearse(ctx context.Context) error {
	if c.prepared == nil {
		return nil
	}
	mac := c.prepared.Attrs().HardwareAddr
	err := c.set(ctx, &agent.Interface{
		Name: cardName, CardMac: mac.String(), Mac: "02:00:00:00:53:00", Addresses: []string{"192.0.2.2/24", "2001:db8::2/64"},
		Routes: []*agent.Route{{Destination: "0.0.0.0/0", Gateway: "192.0.2.1"}, {Destination: "::/0", Gateway: "2001:db8::1"}},
	})
	if err == nil {
		err = c.silence(c.prepared)
	}
	if err == nil {
		err = c.rt.setLink(c.prepared.Attrs().Index, mac, 0, false)
	}
	if err != nil {
		return fmt.Errorf("network card %s: %w", cardName, err)
	}
	return nil
}

// silence takes a card's addresses away, and with them its routes.
func (c *cards) silence(link netlink.Link) error {
	// Off and on again takes the addresses, and the mode "none" keeps one of its link from coming by itself.
	name := link.Attrs().Name
	err := errors.Join(ipv6(name, "disable_ipv6", "1"), ipv6(name, "addr_gen_mode", "1"), ipv6(name, "disable_ipv6", "0"))
	if err != nil {
		return err
	}
	addresses, err := c.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addresses {
		if err := c.AddrDel(link, &a); err != nil {
			return fmt.Errorf("remove address %s: %w", a.IPNet, err)
		}
	}
	return nil
}

func (c *cards) set(ctx context.Context, i *agent.Interface) error {
	mac, err := net.ParseMAC(i.Mac)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	link, err := c.identify(ctx, i, mac)
	if err != nil {
		return err
	}
	// Linux has no IPv6 where packets are smaller.
	v6 := c.rt.v6 && (i.Mtu == 0 || i.Mtu >= minMTUv6)
	if err := c.rt.setLink(link, mac, i.Mtu, v6); err != nil {
		return fmt.Errorf("set address and MTU, and bring up: %w", err)
	}
	if v6 {
		if err := c.rt.addAddress(link, linkAddress(mac), 64); err != nil {
			return fmt.Errorf("add the address of its link: %w", err)
		}
	}
	for _, address := range i.Addresses {
		if err := c.addAddress(link, address); err != nil {
			return err
		}
	}
	for _, r := range i.Routes {
		if err := c.addRoute(link, r); err != nil {
			return err
		}
	}
	for _, n := range i.Neighbours {
		if err := c.addNeighbour(link, n); err != nil {
			return err
		}
	}
	return nil
}

// minMTUv6 is the smallest that IPv6 has. Source: RFC 8200.
const minMTUv6 = 1280

// linkAddress is the IPv6 address of a link that goes with a MAC address. Source: RFC 4291, appendix A.
func linkAddress(mac net.HardwareAddr) net.IP {
	return net.IP{0xfe, 0x80, 0, 0, 0, 0, 0, 0, mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}
}

// identify finds a card, which is to have an address, and gives it its name; it returns its index.
func (c *cards) identify(ctx context.Context, i *agent.Interface, mac net.HardwareAddr) (index int, err error) {
	present := mac
	if i.CardMac != "" {
		if present, err = net.ParseMAC(i.CardMac); err != nil {
			return 0, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	link := c.prepared
	if link == nil || !bytes.Equal(present, link.Attrs().HardwareAddr) {
		if link, err = c.await(ctx, present); err != nil {
			return 0, err
		}
	}
	if link == c.prepared && link.Attrs().Name == i.Name {
		return link.Attrs().Index, nil
	}
	if link, err = c.rename(link, i.Name); err != nil {
		return 0, err
	}
	return link.Attrs().Index, noDiscovery(i.Name)
}

// noDiscovery has a card use what addresses and routes it is given: none by router advertisements. CNI
// made sure that they are the pod's own, so that nobody need be asked.
func noDiscovery(card string) error {
	return errors.Join(ipv6(card, "accept_ra", "0"), ipv6(card, "accept_dad", "0"))
}

// ipv6 sets a parameter of a card; a kernel without IPv6 has none.
func ipv6(card, name, value string) error {
	err := sysctl("net/ipv6/conf/"+card+"/"+name, value)
	if errdefs.IsInvalidArgument(err) {
		return nil
	}
	return err
}

func (c *cards) up(link netlink.Link) error {
	if link.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	if err := c.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up: %w", err)
	}
	return nil
}

// await finds the card by its address, waiting by the kernel's events for it to appear.
func (c *cards) await(ctx context.Context, mac net.HardwareAddr) (netlink.Link, error) {
	if link, err := c.find(mac); link != nil || err != nil {
		return link, err
	}
	done := make(chan struct{})
	defer close(done)
	updates := make(chan netlink.LinkUpdate, 64)
	failed := make(chan error, 1)
	err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{
		ErrorCallback: func(err error) {
			select {
			case failed <- err:
			default:
			}
		},
	})
	if err != nil {
		return nil, fmt.Errorf("watch network cards: %w", err)
	}
	for {
		if link, err := c.find(mac); link != nil || err != nil {
			return link, err
		}
		select {
		case <-updates:
		case err := <-failed:
			return nil, fmt.Errorf("watch network cards: %w", err)
		case <-ctx.Done():
			return nil, fmt.Errorf("no card with this address appeared in the guest: %w", errdefs.ErrNotFound)
		}
	}
}

// find finds the card with the address; nil where there is none.
func (c *cards) find(mac net.HardwareAddr) (netlink.Link, error) {
	links, err := c.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list network cards: %w", err)
	}
	for _, link := range links {
		if bytes.Equal(link.Attrs().HardwareAddr, mac) {
			return link, nil
		}
	}
	return nil, nil
}

func (c *cards) rename(link netlink.Link, name string) (netlink.Link, error) {
	if link.Attrs().Name == name {
		return link, nil
	}
	if err := c.LinkSetDown(link); err != nil {
		return nil, fmt.Errorf("bring down: %w", err)
	}
	if err := c.LinkSetName(link, name); err != nil {
		return nil, fmt.Errorf("rename %s: %w", link.Attrs().Name, err)
	}
	return c.LinkByIndex(link.Attrs().Index)
}

func (c *cards) addAddress(link int, address string) error {
	ip, ipNet, err := net.ParseCIDR(address)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	prefix, _ := ipNet.Mask.Size()
	if err := c.rt.addAddress(link, ip, prefix); err != nil {
		return fmt.Errorf("add address %s: %w", address, err)
	}
	return nil
}

func (c *cards) addRoute(link int, r *agent.Route) error {
	_, dst, err := net.ParseCIDR(r.Destination)
	if err != nil {
		return fmt.Errorf("route: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	gateway, err := optionalIP(r.Gateway)
	if err != nil {
		return err
	}
	source, err := optionalIP(r.Source)
	if err != nil {
		return err
	}
	if err := c.rt.addRoute(link, dst, gateway, source, r); err != nil {
		return fmt.Errorf("add route to %s by %q: %w", r.Destination, r.Gateway, err)
	}
	return nil
}

func optionalIP(s string) (net.IP, error) {
	if s == "" {
		return nil, nil
	}
	if ip := net.ParseIP(s); ip != nil {
		return ip, nil
	}
	return nil, fmt.Errorf("%q is no IP address: %w", s, errdefs.ErrInvalidArgument)
}

func (c *cards) addNeighbour(link int, n *agent.Neighbour) error {
	ip, err := optionalIP(n.Address)
	if err != nil {
		return err
	}
	mac, err := net.ParseMAC(n.Mac)
	if err != nil {
		return fmt.Errorf("neighbour: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := c.rt.addNeighbour(link, ip, mac); err != nil {
		return fmt.Errorf("add neighbour %s: %w", n.Address, err)
	}
	return nil
}

// portForwardDial bounds a connection attempt within the guest.
const portForwardDial = 5 * time.Second

// dialLoopback connects to a port of 127.0.0.1, or else of ::1.
func dialLoopback(ctx context.Context, port uint16) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: portForwardDial}
	var first error
	for _, host := range []string{"127.0.0.1", "::1"} {
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, fmt.Sprint(port)))
		if err == nil {
			return c.(*net.TCPConn), nil
		}
		if first == nil {
			first = err
		}
	}
	if errors.Is(first, os.ErrDeadlineExceeded) {
		return nil, fmt.Errorf("port %d does not answer in the pod: %w", port, errdefs.ErrUnavailable)
	}
	return nil, fmt.Errorf("nothing listens on port %d in the pod: %w: %w", port, first, errdefs.ErrFailedPrecondition)
}
