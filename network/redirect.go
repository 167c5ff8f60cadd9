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
	make func(netlink.FilterAttrs, netlink.Action) netlink.Filter
}{
	{"u32", func(a netlink.FilterAttrs, do netlink.Action) netlink.Filter {
		return &netlink.U32{FilterAttrs: a, Actions: []netlink.Action{do}}
	}},
	{"matchall", func(a netlink.FilterAttrs, do netlink.Action) netlink.Filter {
		return &netlink.MatchAll{FilterAttrs: a, Actions: []netlink.Action{do}}
	}},
	{"flower", func(a netlink.FilterAttrs, do netlink.Action) netlink.Filter {
		return &netlink.Flower{FilterAttrs: a, Actions: []netlink.Action{do}}
	}},
}

// redirect sends every frame that arrives at from out of to.
// Source: tc-mirred(8).
func (n *CNI) redirect(h *netlink.Handle, from, to netlink.Link) error {
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
	attrs := netlink.FilterAttrs{
		LinkIndex: from.Attrs().Index,
		Parent:    netlink.MakeHandle(0xffff, 0),
		Priority:  1,
		Protocol:  unix.ETH_P_ALL,
	}
	first := int(n.kind.Load())
	for i := range filters {
		kind := (first + i) % len(filters)
		f := filters[kind].make(attrs, netlink.NewMirredAction(to.Attrs().Index))
		if err = h.FilterAdd(f); err == nil {
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
