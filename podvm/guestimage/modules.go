package guestimage

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/pierrec/lz4/v4"
)

// atBoot are the modules that every guest loads before the agent answers, in this order: what it
// needs to find its devices, and what nearly every pod needs. A template has them, so that its
// clones need not load them.
var atBoot = []string{
	"virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "erofs", "overlay", "fuse", "crc32c_intel",
}

// The patterns (path.Match) of the kernel modules a guest has, by their path under
// lib/modules/RELEASE/kernel without the suffix. What they depend on comes with them; one that the
// kernel lacks, or has built in, is left out.
var (
	// machine: what VMMs have, and what is hot-added. Loaded when such a device is there.
	machine = []string{
		"drivers/virtio/virtio_pci", "drivers/virtio/virtio_mem", "drivers/virtio/virtio_balloon",
		"drivers/char/virtio_console", "drivers/char/hw_random/virtio-rng", "drivers/misc/pvpanic/*",
		"drivers/block/virtio_blk", "drivers/net/virtio_net", "net/vmw_vsock/vmw_vsock_virtio_transport",
		"drivers/nvdimm/virtio_pmem", "drivers/nvdimm/nd_pmem",
		"fs/erofs/erofs", "fs/overlayfs/overlay", "fs/fuse/fuse", "arch/x86/crypto/crc32c-intel",
	}
	// onDemand: what the kernel asks for when a pod uses it.
	onDemand = []string{
		// File systems and block devices of volumes and scratch disks.
		"fs/ext4/ext4", "fs/xfs/xfs", "fs/quota/quota_v2", "drivers/md/dm-verity", "drivers/block/loop",
		"drivers/scsi/virtio_scsi", "drivers/scsi/sd_mod", "drivers/md/dm-crypt", "fs/binfmt_misc",
		"arch/x86/crypto/sha256-ssse3", "arch/x86/crypto/crct10dif-pclmul",
		// Networks that pods build themselves: containers in pods, service meshes, VPNs.
		"drivers/net/tun", "drivers/net/veth", "drivers/net/dummy", "drivers/net/macvlan",
		"drivers/net/ipvlan/ipvlan", "drivers/net/vxlan/vxlan", "drivers/net/wireguard/wireguard",
		"net/bridge/bridge", "net/bridge/br_netfilter", "net/ipv4/ip_tunnel", "net/ipv4/ipip",
		"net/ipv6/sit", "net/ipv6/ip6_tunnel", "net/ipv4/gre", "net/ipv4/ip_gre", "net/ipv6/ip6_gre", "net/8021q/8021q",
		"net/xfrm/xfrm_user", "net/ipv4/esp4", "net/ipv6/esp6", "net/sctp/sctp", "net/tls/tls",
		"net/ipv4/inet_diag", "net/ipv4/tcp_diag", "net/ipv4/udp_diag", "net/unix/unix_diag", "net/ipv4/tcp_bbr",
		"net/netfilter/nf_*", "net/netfilter/nft_*", "net/netfilter/xt_*", "net/netfilter/nfnetlink*",
		"net/netfilter/ipset/ip_set*", "net/ipv4/netfilter/*", "net/ipv6/netfilter/*",
		"net/sched/sch_*", "net/sched/cls_*", "net/sched/act_*",
	}
	// never are exceptions to onDemand: large, and of no use in a pod.
	never = []string{
		"net/netfilter/*h323*", "net/netfilter/*_sip", "net/netfilter/nf_conntrack_pptp", "net/ipv4/netfilter/*h323*",
		"net/ipv4/netfilter/*pptp*", "net/netfilter/xt_LED", "net/netfilter/xt_ipvs", "net/netfilter/xt_AUDIT",
	}
)

// module is a kernel module.
type module struct {
	name    string // with underscores
	data    []byte
	depends []string
	aliases []string
	// plain modules are not compressed in the initramfs.
	plain bool
}

// modules are a kernel's modules by their path as in wanted.
type modules map[string][]byte

// pick returns the modules a guest has, and those they need, by name.
func (all modules) pick() (map[string]module, error) {
	p := picker{all: all, byName: make(map[string]string, len(all)), picked: make(map[string]module)}
	files := slices.Sorted(maps.Keys(all))
	for _, file := range files {
		p.byName[moduleName(file)] = file
	}
	for _, file := range files {
		if matches(machine, file) {
			if err := p.take(file, true); err != nil {
				return nil, err
			}
		}
	}
	for _, file := range files {
		if matches(onDemand, file) && !matches(never, file) {
			if err := p.take(file, false); err != nil {
				return nil, err
			}
		}
	}
	return p.picked, nil
}

type picker struct {
	all    modules
	byName map[string]string
	picked map[string]module
}

func (p *picker) take(file string, plain bool) error {
	name := moduleName(file)
	if _, ok := p.picked[name]; ok {
		return nil
	}
	m, err := parseModule(name, p.all[file])
	if err != nil {
		return fmt.Errorf("module %s: %w", file, err)
	}
	m.plain = plain
	p.picked[name] = m
	for _, dep := range m.depends {
		file, ok := p.byName[dep]
		if !ok {
			return fmt.Errorf("module %s needs %s, which the kernel's package lacks", name, dep)
		}
		if err := p.take(file, plain); err != nil {
			return err
		}
	}
	return nil
}

func matches(patterns []string, file string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, _ := path.Match(p, file)
		return ok
	})
}

func moduleName(file string) string {
	return strings.ReplaceAll(path.Base(file), "-", "_")
}

// parseModule reads the module's own account of itself.
func parseModule(name string, data []byte) (module, error) {
	m := module{name: name, data: unsigned(data)}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return m, err
	}
	info := f.Section(".modinfo")
	if info == nil {
		return m, errors.New("it has no .modinfo section")
	}
	text, err := info.Data()
	if err != nil {
		return m, err
	}
	for field := range strings.SplitSeq(string(text), "\x00") {
		key, value, _ := strings.Cut(field, "=")
		switch {
		case key == "depends" && value != "":
			for dep := range strings.SplitSeq(value, ",") {
				m.depends = append(m.depends, strings.ReplaceAll(dep, "-", "_"))
			}
		case key == "alias":
			m.aliases = append(m.aliases, value)
		}
	}
	return m, nil
}

// unsigned cuts off the signature. The initramfs is trusted as a whole, the agent in it too, and
// checking signatures takes most of the time of loading a module.
// Source: include/linux/module_signature.h of the Linux kernel.
func unsigned(data []byte) []byte {
	const info = 12
	body, ok := bytes.CutSuffix(data, []byte("~Module signature appended~\n"))
	if !ok || len(body) < info {
		return data
	}
	size := int64(binary.BigEndian.Uint32(body[len(body)-4:]))
	if size > int64(len(body)-info) {
		return data
	}
	return body[:int64(len(body)-info)-size]
}

// addModules puts the modules into the initramfs: NAME.ko, or NAME.ko.lz4 (the size, 4 bytes
// little endian, and one LZ4 block). The agent finds them by three indexes: modules.boot lists what
// to load at once; modules.dep names for each module all that it needs, in the order of loading
// ("name: first second"); modules.alias has the lines of depmod's file ("alias PATTERN name").
func addModules(t tree, release string, picked map[string]module) error {
	dir := "lib/modules/" + release + "/"
	var deps, aliases bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(picked)) {
		m := picked[name]
		if m.plain {
			t.file(dir+name+".ko", 0o644, m.data)
		} else {
			packed, err := compressLZ4(m.data)
			if err != nil {
				return fmt.Errorf("compress module %s: %w", name, err)
			}
			t.file(dir+name+".ko.lz4", 0o644, packed)
		}
		fmt.Fprintf(&deps, "%s:", name)
		for _, dep := range loadOrder(picked, name) {
			fmt.Fprintf(&deps, " %s", dep)
		}
		deps.WriteByte('\n')
		for _, alias := range m.aliases {
			fmt.Fprintf(&aliases, "alias %s %s\n", alias, name)
		}
	}
	t.file(dir+"modules.boot", 0o644, []byte(strings.Join(atBoot, "\n")+"\n"))
	t.file(dir+"modules.dep", 0o644, deps.Bytes())
	t.file(dir+"modules.alias", 0o644, aliases.Bytes())
	return nil
}

func compressLZ4(data []byte) ([]byte, error) {
	packed := make([]byte, 4+lz4.CompressBlockBound(len(data)))
	binary.LittleEndian.PutUint32(packed, uint32(len(data)))
	n, err := lz4.CompressBlockHC(data, packed[4:], lz4.Level4, nil, nil)
	return packed[:4+n], err
}

// loadOrder lists what a module needs, each after its own needs.
func loadOrder(picked map[string]module, name string) []string {
	var order []string
	var visit func(string)
	visit = func(n string) {
		for _, dep := range picked[n].depends {
			if !slices.Contains(order, dep) {
				visit(dep)
				order = append(order, dep)
			}
		}
	}
	visit(name)
	return order
}
