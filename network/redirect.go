package network

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// filters are the classifiers that can take all frames, in the order they are tried: kernels are
// built without one or the other.
var filters = []struct {
	kind string
	make func(a netlink.FilterAttrs, do ...netlink.Action) netlink.Filter
}{
	{"u32", func(a netlink.FilterAttrs, do ...netlink.Action) netlink.Filter {
		return &netlink.U32{FilterAttrs: a, Actions: do}
	}},
	{"matchall", func(a netlink.FilterAttrs, do ...netlink.Action) netlink.Filter {
		return &netlink.MatchAll{FilterAttrs: a, Actions: do}
	}},
	{"flower", func(a netlink.FilterAttrs, do ...netlink.Action) netlink.Filter {
		return &netlink.Flower{FilterAttrs: a, Actions: do}
	}},
}

// redirect sends every frame that arrives at from out of to, but for those of the protocols in but: the
// namespace's stack gets them, which has no use for them.
// Source: tc-mirred(8).
func (n *CNI) redirect(h *netlink.Handle, from, to netlink.Link, but ...uint16) error {
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
	for i, protocol := range but {
		if err := n.filter(h, from, i+1, protocol); err != nil {
			return err
		}
	}
	return n.filter(h, from, len(but)+1, unix.ETH_P_ALL, netlink.NewMirredAction(to.Attrs().Index))
}

// filter has something, or nothing, done with all frames of a protocol that arrive at from.
func (n *CNI) filter(h *netlink.Handle, from netlink.Link, priority int, protocol uint16, do ...netlink.Action) error {
	attrs := netlink.FilterAttrs{
		LinkIndex: from.Attrs().Index,
		Parent:    netlink.MakeHandle(0xffff, 0),
		Priority:  uint16(priority),
		Protocol:  protocol,
	}
	first := int(n.kind.Load())
	var err error
	for i := range filters {
		kind := (first + i) % len(filters)
		if err = h.FilterAdd(filters[kind].make(attrs, do...)); err == nil {
			n.kind.Store(int32(kind))
			return nil
		}
		if !absent(err) {
			return fmt.Errorf("%s filter: %w", filters[kind].kind, err)
		}
	}
	return fmt.Errorf("filter: %w; this kernel lacks u32, matchall and flower, or mirred: run \"modprobe -a cls_u32 act_mirred\": %w",
		err, errdefs.ErrFailedPrecondition)
}

// absent tells whether the kernel lacks the kind that it was asked for.
func absent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP)
}
