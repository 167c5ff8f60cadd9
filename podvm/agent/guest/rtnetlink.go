package guest

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// rtnetlink is a socket to the kernel's configuration of the network. Each request is answered before the next.
// Source: rtnetlink(7).
type rtnetlink struct {
	fd  int
	buf []byte
	// v6 says that the kernel has IPv6.
	v6 bool
}

// rtAnswer is enough for the answer to a request: its outcome, and where it failed the request itself.
const rtAnswer = 4096

func newRTNetlink() (rtnetlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return rtnetlink{}, err
	}
	_, err = os.Stat("/proc/sys/net/ipv6")
	return rtnetlink{fd: fd, buf: make([]byte, rtAnswer), v6: err == nil}, nil
}

func (r rtnetlink) close() { unix.Close(r.fd) }

// do sends a request and takes the answer, which is there when it has been sent.
func (r rtnetlink) do(kind, flags int, parts ...nl.NetlinkRequestData) error {
	request := nl.NewNetlinkRequest(kind, flags|unix.NLM_F_ACK)
	for _, p := range parts {
		request.AddData(p)
	}
	if err := unix.Sendto(r.fd, request.Serialize(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	n, _, err := unix.Recvfrom(r.fd, r.buf, unix.MSG_DONTWAIT)
	if err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	const code = unix.SizeofNlMsghdr
	answer := r.buf[:n]
	if n < code+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR || binary.NativeEndian.Uint32(answer[8:]) != request.Seq {
		return fmt.Errorf("an answer to something else, of %d bytes: %w", n, errdefs.ErrInternal)
	}
	if code := -int32(binary.NativeEndian.Uint32(answer[code:])); code != 0 {
		return unix.Errno(code)
	}
	return nil
}

// replace makes what is asked for, or makes it so where it is there.
const replace = unix.NLM_F_CREATE | unix.NLM_F_REPLACE

// setLink gives a card an address, and an MTU where that is not 0, and brings it up. With v6 it will have an IPv6
// address of its link when it comes up another time.
func (r rtnetlink) setLink(link int, mac net.HardwareAddr, mtu uint32, v6 bool) error {
	info := nl.NewIfInfomsg(unix.AF_UNSPEC)
	info.Index, info.Flags, info.Change = int32(link), unix.IFF_UP, unix.IFF_UP
	parts := []nl.NetlinkRequestData{info, nl.NewRtAttr(unix.IFLA_ADDRESS, mac)}
	if mtu != 0 {
		parts = append(parts, nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(mtu)))
	}
	if v6 {
		family := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
		family.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, nl.Uint8Attr(nl.IN6_ADDR_GEN_MODE_EUI64))
		parts = append(parts, family)
	}
	return r.do(unix.RTM_NEWLINK, 0, parts...)
}

// addAddress adds one that is known to be nobody else's.
func (r rtnetlink) addAddress(link int, ip net.IP, prefix int) error {
	family, ip := familyOf(ip)
	info := nl.NewIfAddrmsg(family)
	info.Index, info.Prefixlen = uint32(link), uint8(prefix)
	if family == unix.AF_INET6 {
		info.IfAddrmsg.Flags = unix.IFA_F_NODAD
		return r.do(unix.RTM_NEWADDR, replace, info, nl.NewRtAttr(unix.IFA_ADDRESS, ip))
	}
	parts := []nl.NetlinkRequestData{info, nl.NewRtAttr(unix.IFA_LOCAL, ip), nl.NewRtAttr(unix.IFA_ADDRESS, ip)}
	if prefix < 31 {
		broadcast := make(net.IP, net.IPv4len)
		mask := net.CIDRMask(prefix, 32)
		for i := range broadcast {
			broadcast[i] = ip[i] | ^mask[i]
		}
		parts = append(parts, nl.NewRtAttr(unix.IFA_BROADCAST, broadcast))
	}
	return r.do(unix.RTM_NEWADDR, replace, parts...)
}

// addRoute adds one by a gateway, from a source address, which may be nil; what else it is like stands in like.
func (r rtnetlink) addRoute(link int, dst *net.IPNet, gateway, source net.IP, like *agent.Route) error {
	family, ip := familyOf(dst.IP)
	prefix, _ := dst.Mask.Size()
	info := nl.NewRtMsg()
	info.Family, info.Dst_len, info.Scope = uint8(family), uint8(prefix), uint8(like.Scope)
	parts := []nl.NetlinkRequestData{info, nl.NewRtAttr(unix.RTA_DST, ip)}
	if like.Type != 0 {
		info.Type = uint8(like.Type)
	} else {
		parts = append(parts, nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(link))))
	}
	for _, via := range []struct {
		kind int
		ip   net.IP
	}{{unix.RTA_GATEWAY, gateway}, {unix.RTA_PREFSRC, source}} {
		if via.ip == nil {
			continue
		}
		of, ip := familyOf(via.ip)
		if of != family {
			return fmt.Errorf("%s is of another IP version: %w", ip, errdefs.ErrInvalidArgument)
		}
		parts = append(parts, nl.NewRtAttr(via.kind, ip))
	}
	if like.Metric != 0 {
		parts = append(parts, nl.NewRtAttr(unix.RTA_PRIORITY, nl.Uint32Attr(like.Metric)))
	}
	if like.Mtu != 0 || like.Advmss != 0 {
		metrics := nl.NewRtAttr(unix.RTA_METRICS, nil)
		for _, m := range []struct {
			kind  int
			value uint32
		}{{unix.RTAX_MTU, like.Mtu}, {unix.RTAX_ADVMSS, like.Advmss}} {
			if m.value != 0 {
				metrics.AddRtAttr(m.kind, nl.Uint32Attr(m.value))
			}
		}
		parts = append(parts, metrics)
	}
	return r.do(unix.RTM_NEWROUTE, replace, parts...)
}

// addNeighbour adds one for good.
func (r rtnetlink) addNeighbour(link int, ip net.IP, mac net.HardwareAddr) error {
	family, ip := familyOf(ip)
	info := &netlink.Ndmsg{Family: uint8(family), Index: uint32(link), State: netlink.NUD_PERMANENT}
	return r.do(unix.RTM_NEWNEIGH, replace, info, nl.NewRtAttr(unix.NDA_DST, ip), nl.NewRtAttr(unix.NDA_LLADDR, mac))
}

// familyOf is an address's, and the address in its form: 4 or 16 bytes.
func familyOf(ip net.IP) (int, net.IP) {
	if v4 := ip.To4(); v4 != nil {
		return unix.AF_INET, v4
	}
	return unix.AF_INET6, ip
}
