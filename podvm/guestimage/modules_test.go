package guestimage

import (
	"bytes"
	"encoding/binary"
	"maps"
	"slices"
	"testing"
)

func TestParseStanza(t *testing.T) {
	got := parseStanza("Package: crun\nVersion: 1:1.8-1\nArchitecture: amd64\nPre-Depends: dpkg (>= 1)\n" +
		"Depends: libc6 (>= 2.34), libelogind0 | libsystemd0, libyajl2:any\nDescription: Package: no\n Version: 9\nSHA256: 00\n")
	if got.name != "crun" || got.version != "1:1.8-1" || got.sha256 != "00" || got.file() != "crun_1%3a1.8-1_amd64.deb" {
		t.Errorf("got %+v, file %s", got, got.file())
	}
	if want := []string{"dpkg", "libc6", "libelogind0", "libyajl2"}; !slices.Equal(got.depends, want) {
		t.Errorf("depends on %q, want %q", got.depends, want)
	}
}

func TestUnsigned(t *testing.T) {
	signature := []byte("PKCS#7")
	info := make([]byte, 12)
	binary.BigEndian.PutUint32(info[8:], uint32(len(signature)))
	signed := slices.Concat([]byte("module"), signature, info, []byte("~Module signature appended~\n"))
	if got := unsigned(signed); string(got) != "module" {
		t.Errorf("got %q", got)
	}
	binary.BigEndian.PutUint32(signed[len(signed)-32:], 1<<31) // a size beyond the file
	for _, whole := range [][]byte{signed, []byte("module"), nil} {
		if got := unsigned(whole); !bytes.Equal(got, whole) {
			t.Errorf("cut %q to %q", whole, got)
		}
	}
}

func TestLoadOrder(t *testing.T) {
	picked := map[string]module{
		"nft_nat":      {depends: []string{"nf_tables", "nf_nat"}},
		"nf_nat":       {depends: []string{"nf_conntrack", "libcrc32c"}},
		"nf_conntrack": {depends: []string{"libcrc32c"}},
		"nf_tables":    {depends: []string{"nfnetlink", "libcrc32c"}},
		"libcrc32c":    {}, "nfnetlink": {},
	}
	order := loadOrder(picked, "nft_nat")
	if want := len(picked) - 1; len(order) != want {
		t.Fatalf("loads %q, want all %d", order, want)
	}
	for i, name := range order {
		for _, dep := range picked[name].depends {
			if !slices.Contains(order[:i], dep) {
				t.Errorf("%s comes before %s in %q", name, dep, order)
			}
		}
	}
}

func TestPickFollowsPatterns(t *testing.T) {
	for file, want := range map[string]bool{
		"net/netfilter/xt_conntrack": true, "net/netfilter/nf_conntrack_sip": false,
		"drivers/virtio/virtio_pci": true, "fs/btrfs/btrfs": false, "net/netfilter/ipvs/ip_vs": false,
	} {
		got := matches(slices.Concat(machine, onDemand), file) && !matches(never, file)
		if got != want {
			t.Errorf("%s: picked %v, want %v", file, got, want)
		}
	}
	names := make(map[string]bool)
	for _, file := range machine {
		names[moduleName(file)] = true
	}
	for _, name := range atBoot {
		if !names[name] {
			t.Errorf("%s is loaded at boot but not among machine: %q", name, slices.Sorted(maps.Keys(names)))
		}
	}
}
