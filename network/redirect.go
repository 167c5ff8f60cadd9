package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// frames are those of a protocol (ETH_P_...): all of them, or those to an address, or to a port by UDP and IPv4.
type frames struct {
	protocol uint16
	dst      net.IP // nil: any
	udp      uint16 // 0: any
}

func (f frames) all() bool { return f.dst == nil && f.udp == 0 }

// classifiers pick frames, in the order they are tried: kernels are built without one or the other. Each
// makes a filter, or nil if it can't pick these.
var classifiers = []struct {
	kind string
	make func(f frames, a netlink.FilterAttrs, do []netlink.Action) netlink.Filter
}{
	{"u32", func(f frames, a netlink.FilterAttrs, do []netlink.Action) netlink.Filter {
		return &netlink.U32{FilterAttrs: a, Sel: f.words(), Actions: do}
	}},
	{"matchall", func(f frames, a netlink.FilterAttrs, do []netlink.Action) netlink.Filter {
		if !f.all() {
			return nil
		}
		return &netlink.MatchAll{FilterAttrs: a, Actions: do}
	}},
	{"flower", func(f frames, a netlink.FilterAttrs, do []netlink.Action) netlink.Filter {
		flower := &netlink.Flower{FilterAttrs: a, Actions: do}
		if !f.all() {
			flower.EthType, flower.DestIP = f.protocol, f.dst
		}
		if f.udp != 0 {
			udp := nl.IPPROTO_UDP
			flower.IPProto, flower.DestPort = &udp, f.udp
		}
		return flower
	}},
}

// words is by what u32 picks frames: words of the packet; nil for all.
func (f frames) words() *netlink.TcU32Sel {
	var keys []netlink.TcU32Key
	switch {
	case f.all():
		return nil
	case f.udp != 0: // a header without options, no further fragment, UDP, the port
		keys = []netlink.TcU32Key{
			{Mask: 0x0f000000, Val: 0x05000000, Off: 0}, {Mask: 0x1fff, Off: 4},
			{Mask: 0x00ff0000, Val: unix.IPPROTO_UDP << 16, Off: 8}, {Mask: 0xffff, Val: uint32(f.udp), Off: 20},
		}
	default:
		dst, offset := f.dst.To4(), int32(16)
		if dst == nil {
			dst, offset = f.dst, 24
		}
		for i := int32(0); i < int32(len(dst)); i += 4 {
			keys = append(keys, netlink.TcU32Key{Mask: ^uint32(0), Val: binary.BigEndian.Uint32(dst[i:]), Off: offset + i})
		}
	}
	return &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL, Nkeys: uint8(len(keys)), Keys: keys}
}

// redirect sends every frame that arrives at from out of to, but for those in but, as far as this kernel can
// tell them: the namespace's stack gets them.
// Source: tc-mirred(8).
func (n *CNI) redirect(h *netlink.Handle, from, to netlink.Link, but ...frames) error {
	err := h.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from.Attrs().Index,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_INGRESS,
	}})
	if absent(err) {
		return fmt.Errorf("ingress qdisc: %w; this kernel has none, run \"modprobe sch_ingress\": %w", err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("ingress qdisc: %w", err)
	}
	for i, f := range but {
		if err := n.filter(h, from, i+1, f); err != nil && !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	return n.filter(h, from, len(but)+1, frames{protocol: unix.ETH_P_ALL}, netlink.NewMirredAction(to.Attrs().Index))
}

// filter has something, or nothing, done with frames that arrive at from.
func (n *CNI) filter(h *netlink.Handle, from netlink.Link, priority int, f frames, do ...netlink.Action) error {
	attrs := netlink.FilterAttrs{
		LinkIndex: from.Attrs().Index,
		Parent:    netlink.MakeHandle(0xffff, 0),
		Priority:  uint16(priority),
		Protocol:  f.protocol,
	}
	first := int(n.kind.Load())
	var err error
	for i := range classifiers {
		kind := (first + i) % len(classifiers)
		filter := classifiers[kind].make(f, attrs, do)
		if filter == nil {
			continue
		}
		if err = h.FilterAdd(filter); err == nil {
			n.kind.Store(int32(kind))
			return nil
		}
		if !absent(err) {
			return fmt.Errorf("%s filter: %w", classifiers[kind].kind, err)
		}
	}
	return fmt.Errorf("filter: %w; this kernel lacks u32, matchall and flower, or mirred: run \"modprobe -a cls_u32 act_mirred\": %w",
		err, errdefs.ErrFailedPrecondition)
}

// absent tells whether the kernel lacks the kind that it was asked for.
func absent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP)
}
