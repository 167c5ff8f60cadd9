package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/bits"
	"os"
	"strings"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// checkFilters refuses a pod in whose namespace, which is the thread's, a plugin has put packet filters: frames
// of a VM go from card to card and never pass them, so that who is to be kept out would be let in.
func (n *CNI) checkFilters(pod string) error {
	found, err := filters()
	if err != nil {
		return fmt.Errorf("look for packet filters: %w", err)
	}
	if len(found) == 0 {
		return nil
	}
	if n.o.AllowFilters {
		slog.Warn("packet filters in a pod's namespace, which its VM's packets never pass", "pod", pod, "tables", found)
		return nil
	}
	return fmt.Errorf("a network plugin has put packet filters into the pod's namespace (tables %s), which a VM's packets never pass: "+
		"have a service mesh use its init container in place of its CNI plugin, run such pods by another runtime, "+
		"or set cni.allow_filters if they are not needed: %w", strings.Join(found, ", "), errdefs.ErrNotImplemented)
}

// filters names the tables of the thread's namespace that have something in them.
func filters() ([]string, error) {
	found, err := nftables()
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	for _, x := range []xtables{{"ip", unix.AF_INET, unix.SOL_IP}, {"ip6", unix.AF_INET6, unix.SOL_IPV6}} {
		filled, err := x.filled()
		if err != nil {
			return nil, fmt.Errorf("%stables: %w", x.family, err)
		}
		found = append(found, filled...)
	}
	return found, nil
}

// nftables names the tables of nftables that have a chain, a set, or other objects; as "nft filter".
// Source: Linux uapi/linux/netfilter/nf_tables.h.
func nftables() (found []string, err error) {
	tables, err := dump(func() ([][]byte, error) {
		request := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP)
		request.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC})
		return request.Execute(unix.NETLINK_NETFILTER, 0)
	})
	// A kernel without nftables, or without netfilter.
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		attrs, err := nl.ParseRouteAttrAsMap(t[nl.SizeofNfgenmsg:])
		if err != nil {
			return nil, err
		}
		if use := attrs[unix.NFTA_TABLE_USE].Value; len(use) == 4 && binary.BigEndian.Uint32(use) == 0 {
			continue
		}
		found = append(found, "nft "+unix.ByteSliceToString(attrs[unix.NFTA_TABLE_NAME].Value))
	}
	return found, nil
}

// xtables are the tables of iptables-legacy(8), or ip6tables-legacy(8).
type xtables struct {
	family       string
	socket, info int
}

// filled names those that have rules, as "ip filter": a table comes into being where somebody lists it.
func (x xtables) filled() (found []string, err error) {
	names, err := os.ReadFile("/proc/thread-self/net/" + x.family + "_tables_names")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a kernel without them
	}
	if err != nil {
		return nil, err
	}
	for name := range strings.FieldsSeq(string(names)) {
		empty, err := x.empty(name)
		if err != nil {
			return nil, fmt.Errorf("table %s: %w", name, err)
		}
		if !empty {
			found = append(found, x.family+" "+name)
		}
	}
	return found, nil
}

// empty tells whether a table has no more than the policies of its hooks, and the entry that ends it.
// Source: Linux uapi/linux/netfilter_ipv4/ip_tables.h, struct ipt_getinfo; IPv6's is the same.
func (x xtables) empty(table string) (bool, error) {
	const getInfo = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	fd, err := unix.Socket(x.socket, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	var info struct {
		name             [32]byte
		hooks            uint32
		entry, underflow [5]uint32
		entries, size    uint32
	}
	copy(info.name[:], table)
	length := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(x.info), getInfo,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return false, errno
	}
	return int(info.entries) == bits.OnesCount32(info.hooks)+1, nil
}
