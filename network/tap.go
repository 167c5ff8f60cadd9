package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const tunDevice = "/dev/net/tun"

// tapFlags: frames come with a virtio-net header, so that checksums and segmentation may be left
// to whoever does them last (the VMM enables what its guest negotiated, TUNSETOFFLOAD). One queue:
// a tap with IFF_MULTI_QUEUE has 256 of each kind, with their queueing disciplines, whether used
// or not, and a VM takes one descriptor per card.
const tapFlags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR

// tapName is that of the tap behind a pod's i-th interface.
func tapName(i int) string { return fmt.Sprint(tapPrefix, i) }

const tapPrefix = "caisson"

// connect puts a tap beside each interface in the pod's namespace, where the first is already,
// redirects what arrives at either to the other, and returns what the guest's cards must be like, the
// primary first.
//
// The interfaces keep their addresses, though those are the guest's: CHECK wants to see them, and
// DEL of the bridge plugin takes the addresses whose masquerading it removes from there. The
// namespace's own stack can't answer for the guest, because redirected frames never reach it,
// whether or not a VM is there to take them.
func (n *CNI) connect(rt *libcni.RuntimeConf, result *types100.Result) ([]Interface, error) {
	var ifaces []Interface
	err := inNetNS(rt.NetNS, func() error {
		if err := n.checkFilters(rt.ContainerID); err != nil {
			return err
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		defer h.Close()
		links, err := podLinks(h, rt.IfName)
		if err != nil {
			return err
		}
		if err := checkRules(h); err != nil {
			return err
		}
		routes, refusing, err := podRoutes(h, links)
		if err != nil {
			return err
		}
		for i, link := range links {
			iface, err := inspect(h, link, routes, result)
			if err != nil {
				return fmt.Errorf("interface %s: %w", link.Attrs().Name, err)
			}
			iface.Tap = tapName(i)
			if i > 0 {
				err = leaveTap(h, iface.Tap)
			}
			if err == nil {
				err = n.join(h, iface.Tap, link)
			}
			if err != nil {
				return fmt.Errorf("tap for interface %s: %w", link.Attrs().Name, err)
			}
			ifaces = append(ifaces, iface)
		}
		ifaces[0].Routes = append(ifaces[0].Routes, refusing...)
		return nil
	})
	return ifaces, err
}

// podLinks lists the interfaces of the thread's namespace that are to be the guest's cards, the one that the plugins
// were asked for first: all that are up, whether or not they stand in a result, as Multus reports only the
// primary one. Those that make up another one, as a bond, are the plugins' own.
func podLinks(h *netlink.Handle, primary string) ([]netlink.Link, error) {
	all, err := dump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	all = slices.DeleteFunc(all, func(l netlink.Link) bool {
		a := l.Attrs()
		return a.Flags&net.FlagLoopback != 0 || a.Flags&net.FlagUp == 0 || strings.HasPrefix(a.Name, tapPrefix)
	})
	var links []netlink.Link
	for _, l := range all {
		a := l.Attrs()
		if indexed(all, a.MasterIndex) != nil {
			continue
		}
		if below := indexed(all, a.ParentIndex); below != nil && below != l && a.NetNsID < 0 {
			return nil, fmt.Errorf("interface %s is on %s of the same pod, whose frames a VM gets before it; have the network plugin make it on an interface of the node: %w",
				a.Name, below.Attrs().Name, errdefs.ErrNotImplemented)
		}
		if a.Name == primary {
			links = slices.Insert(links, 0, l)
		} else {
			links = append(links, l)
		}
	}
	if len(links) == 0 || links[0].Attrs().Name != primary {
		return nil, fmt.Errorf("the CNI plugins succeeded but left no interface %s that is up in the pod's namespace; see their configuration: %w",
			primary, errdefs.ErrUnavailable)
	}
	return links, nil
}

// indexed is the link with the index; nil where there is none.
func indexed(links []netlink.Link, index int) netlink.Link {
	for _, l := range links {
		if l.Attrs().Index == index {
			return l
		}
	}
	return nil
}

// join makes a tap of the thread's namespace and link one.
func (n *CNI) join(h *netlink.Handle, name string, link netlink.Link) error {
	if err := silence(name); err != nil { // again: a plugin may have changed it for all interfaces
		return err
	}
	tap, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkSetMTU(tap, link.Attrs().MTU); err != nil {
		return fmt.Errorf("mtu %d of %s: %w", link.Attrs().MTU, name, err)
	}
	if link.Type() != "veth" { // others, as macvlan and VFs, have the groups only that the namespace has joined
		if err := h.LinkSetAllmulticastOn(link); err != nil {
			return fmt.Errorf("all multicast groups for %s: %w", link.Attrs().Name, err)
		}
	}
	if err := n.redirect(h, link, tap, slices.Concat(memberships, leases)...); err != nil {
		return fmt.Errorf("redirect %s to %s: %w", link.Attrs().Name, name, err)
	}
	// VMMs announce a clone's card by RARP, several times, and by the address that it had in the template:
	// the same for all pods, of whose guests each would be woken.
	if err := n.redirect(h, tap, link, frames{protocol: unix.ETH_P_RARP}); err != nil {
		return fmt.Errorf("redirect %s to %s: %w", name, link.Attrs().Name, err)
	}
	return nil
}

// memberships are who says which multicast groups it has joined, by MLDv2 and IGMPv3: for routers and switches.
// A bridge floods them, nine when a pod starts, and each would wake all guests. Like a switch that listens to
// them, and does not pass them on to hosts (RFC 4541), the pod's interface keeps them from the guest.
var memberships = []frames{
	{protocol: unix.ETH_P_IPV6, dst: net.ParseIP("ff02::16")},
	{protocol: unix.ETH_P_IP, dst: net.IPv4(224, 0, 0, 22)},
}

// leases are what a DHCP server answers: to the dhcp plugin's daemon, which listens in the namespace for as long
// as the pod has its address.
var leases = []frames{{protocol: unix.ETH_P_IP, udp: 68}}

// silence keeps the namespace's stack from greeting the guest with its own neighbour discovery.
func silence(tap string) error { return ipv6Sysctl(tap, "disable_ipv6", "1") }

// createTap makes a tap in the thread's namespace that is up and outlives its descriptor.
func createTap(h *netlink.Handle, name string) (*os.File, error) {
	fd, err := attachTap(name, tapFlags|unix.IFF_TUN_EXCL)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	if err := makeTap(h, fd, name); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func makeTap(h *netlink.Handle, fd int, name string) error {
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make %s persistent: %w", name, err)
	}
	if err := silence(name); err != nil {
		return err
	}
	tap, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkSetUp(tap); err != nil {
		return fmt.Errorf("%s up: %w", name, err)
	}
	return nil
}

// leaveTap makes a tap for OpenTap.
func leaveTap(h *netlink.Handle, name string) error {
	// A child forked meanwhile would hold a copy of the descriptor until its exec, and OpenTap
	// would find the tap in use.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	tap, err := createTap(h, name)
	if err != nil {
		return err
	}
	return tap.Close()
}

// LooseTap returns the descriptor of a tap that is joined to nothing and goes with its last
// descriptor: for the card of a VM that has no network.
func LooseTap() (tap *os.File, err error) {
	err = onThread(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		defer h.Close()
		tap, err = createTap(h, tapName(0))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make a tap: %w", err)
	}
	return tap, nil
}

// OpenTap returns a descriptor of the i-th interface's tap, non-blocking, to be given to a VMM.
// Each read and write is one frame behind a virtio-net header (10 bytes until TUNSETVNETHDRSZ).
// A tap serves one VMM at a time: while another holds it, it is errdefs.ErrFailedPrecondition.
// One whose namespace is gone, as after a reboot, is errdefs.ErrNotFound.
func (n *CNI) OpenTap(a *Attachment, i int) (*os.File, error) {
	if i < 0 || i >= len(a.Interfaces) {
		return nil, fmt.Errorf("interface %d of %d: %w", i, len(a.Interfaces), errdefs.ErrInvalidArgument)
	}
	name := a.Interfaces[i].Tap
	if !isNetNS(a.NetNS) {
		return nil, fmt.Errorf("network namespace %s is gone: %w", a.NetNS, errdefs.ErrNotFound)
	}
	fd := -1
	err := inNetNS(a.NetNS, func() error {
		// Attaching to a tap that isn't there would make one, joined to nothing.
		if _, err := net.InterfaceByName(name); err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		var err error
		fd, err = attachTap(name, tapFlags)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open tap %s in %s: %w", name, a.NetNS, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// attachTap opens the tap of that name in the thread's namespace.
// Source: Linux Documentation/networking/tuntap.rst.
func attachTap(name string, flags int) (int, error) {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return -1, fmt.Errorf("open %s: %w; run \"modprobe tun\": %w", tunDevice, err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", tunDevice, err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(uint16(flags))
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EBUSY) {
			return -1, fmt.Errorf("%s is in use: %w: %w", name, err, errdefs.ErrFailedPrecondition)
		}
		return -1, fmt.Errorf("attach to %s: %w", name, err)
	}
	return fd, nil
}
