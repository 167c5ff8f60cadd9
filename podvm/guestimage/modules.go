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
)

// wanted are the patterns (path.Match) of the kernel modules a guest has, by their path under
// lib/modules/RELEASE/kernel without the suffix. What they depend on comes with them; one that the
// kernel lacks, or has built in, is left out.
var wanted = []string{
	// The machine: what every VMM has, and what is hot-added.
	"drivers/virtio/virtio_pci", "drivers/virtio/virtio_mem", "drivers/virtio/virtio_balloon",
	"drivers/char/virtio_console", "drivers/char/hw_random/virtio-rng", "drivers/misc/pvpanic/*",
	"drivers/block/virtio_blk", "drivers/scsi/virtio_scsi", "drivers/scsi/sd_mod",
	"drivers/net/virtio_net", "net/vmw_vsock/vmw_vsock_virtio_transport",
	"drivers/nvdimm/virtio_pmem", "drivers/nvdimm/nd_pmem", "drivers/acpi/button",
	// File systems and block devices of images, volumes and scratch disks.
	"fs/erofs/erofs", "fs/overlayfs/overlay", "fs/fuse/fuse", "fs/ext4/ext4", "fs/xfs/xfs",
	"fs/quota/quota_v2", "drivers/md/dm-verity", "drivers/block/loop",
	"arch/x86/crypto/crc32c-intel", "arch/x86/crypto/sha256-ssse3", "arch/x86/crypto/crct10dif-pclmul",
	// Networks that pods build themselves: containers in pods, service meshes, VPNs.
	"drivers/net/tun", "drivers/net/veth", "drivers/net/dummy", "drivers/net/macvlan",
	"drivers/net/ipvlan/ipvlan", "drivers/net/vxlan/vxlan", "drivers/net/wireguard/wireguard",
	"net/bridge/bridge", "net/bridge/br_netfilter", "net/ipv4/ip_tunnel", "net/ipv4/ipip",
	"net/ipv6/sit", "net/ipv4/inet_diag", "net/ipv4/tcp_diag", "net/ipv4/tcp_bbr",
	"net/netfilter/nf_*", "net/netfilter/nft_*", "net/netfilter/xt_*", "net/netfilter/nfnetlink*",
	"net/netfilter/ipset/ip_set*", "net/ipv4/netfilter/*", "net/ipv6/netfilter/*",
	"net/sched/sch_*", "net/sched/cls_*", "net/sched/act_*",
}

// unwanted are exceptions to wanted: large, and of no use in a pod.
var unwanted = []string{
	"net/netfilter/*h323*", "net/netfilter/*_sip", "net/netfilter/nf_conntrack_pptp", "net/ipv4/netfilter/*h323*",
	"net/ipv4/netfilter/*pptp*", "net/netfilter/xt_LED", "net/netfilter/xt_ipvs", "net/netfilter/xt_AUDIT",
}

// module is a kernel module.
type module struct {
	name    string // with underscores
	data    []byte
	depends []string
	aliases []string
}

// modules are a kernel's modules by their path as in wanted.
type modules map[string][]byte

// pick returns the wanted modules and those they need, by name.
func (all modules) pick() (map[string]module, error) {
	byName := make(map[string]string, len(all))
	for file := range all {
		byName[moduleName(file)] = file
	}
	picked := make(map[string]module)
	var take func(file string) error
	take = func(file string) error {
		name := moduleName(file)
		if _, ok := picked[name]; ok {
			return nil
		}
		m, err := parseModule(name, all[file])
		if err != nil {
			return fmt.Errorf("module %s: %w", file, err)
		}
		picked[name] = m
		for _, dep := range m.depends {
			file, ok := byName[dep]
			if !ok {
				return fmt.Errorf("module %s needs %s, which the kernel's package lacks", name, dep)
			}
			if err := take(file); err != nil {
				return err
			}
		}
		return nil
	}
	for _, file := range slices.Sorted(maps.Keys(all)) {
		if matches(wanted, file) && !matches(unwanted, file) {
			if err := take(file); err != nil {
				return nil, err
			}
		}
	}
	return picked, nil
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

// addModules puts the modules into the initramfs with two indexes: modules.dep names for each
// module all that it needs, in the order of loading ("name: first second"), modules.alias has the
// lines of depmod's file ("alias PATTERN name").
func addModules(t tree, release string, picked map[string]module) {
	dir := "lib/modules/" + release + "/"
	var deps, aliases bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(picked)) {
		m := picked[name]
		t.file(dir+name+".ko", 0o644, m.data)
		fmt.Fprintf(&deps, "%s:", name)
		for _, dep := range loadOrder(picked, name) {
			fmt.Fprintf(&deps, " %s", dep)
		}
		deps.WriteByte('\n')
		for _, alias := range m.aliases {
			fmt.Fprintf(&aliases, "alias %s %s\n", alias, name)
		}
	}
	t.file(dir+"modules.dep", 0o644, deps.Bytes())
	t.file(dir+"modules.alias", 0o644, aliases.Bytes())
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
