package network

import (
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// What a chained plugin puts into the namespace no packet of the VM passes.
func TestFilters(t *testing.T) {
	for name, c := range map[string]struct {
		commands string
		want     []string
	}{
		"none":                 {"true", nil},
		"nftables":             {"iptables-nft -t nat -A OUTPUT -p tcp -j REDIRECT --to-ports 15001", []string{"nft nat"}},
		"nftables, IPv6":       {"ip6tables-nft -A INPUT -j DROP", []string{"nft filter"}},
		"nftables, taken away": {"iptables-nft -A INPUT -j DROP && iptables-nft -F && iptables-nft -X", nil},
		"legacy":               {"iptables-legacy -t nat -A OUTPUT -p tcp -j REDIRECT --to-ports 15001", []string{"ip nat"}},
		"legacy, IPv6":         {"ip6tables-legacy -A INPUT -j DROP", []string{"ip6 filter"}},
		"listed":               {"iptables-nft -S && ip6tables-nft -S && iptables-legacy -S && ip6tables-legacy -t mangle -S", nil},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "ns")
			if err := createNetNS(path, empty); err != nil {
				t.Fatal(err)
			}
			defer deleteNetNS(path)
			var found []string
			err := inNetNS(path, func() (err error) {
				if out, err := exec.Command("sh", "-c", c.commands).CombinedOutput(); err != nil {
					return errors.Join(err, errors.New(string(out)))
				}
				found, err = filters()
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(found, c.want) {
				t.Errorf("found %q, want %q", found, c.want)
			}
		})
	}
}

func TestPodWithFiltersIsRefused(t *testing.T) {
	const mesh = `[ $CNI_COMMAND = ADD ] || exit 0
nsenter --net=$CNI_NETNS iptables-nft -t nat -A OUTPUT -p tcp -j REDIRECT --to-ports 15001 >&2 || exit 1
exec sed 's/.*"prevResult"://; s/,"type":"mesh".*//'`
	n := newBridgeNode(t, map[string]any{"type": "mesh"})
	n.script(t, "mesh", mesh)
	_, err := n.Setup(t.Context(), n.pod(1))
	if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "nft nat") || !strings.Contains(err.Error(), "cni.allow_filters") {
		t.Errorf("setup: %v, want the table and what to do", err)
	}
	n.wantNothingLeft(t)
	n.o.AllowFilters = true
	n.setup(t, n.pod(1))
	n.teardown(t, n.pod(1).ID)
}

func BenchmarkFilters(b *testing.B) {
	for b.Loop() {
		if _, err := filters(); err != nil {
			b.Fatal(err)
		}
	}
}
