package network

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

const someConf = `{"cniVersion": "1.0.0", "name": "NAME", "plugins": [{"type": "bridge", "ipam": {"type": "host-local"}}]}`

func named(name string) string { return strings.Replace(someConf, "NAME", name, 1) }

func TestStatus(t *testing.T) {
	n := newNode(t)
	conf := filepath.Join(n.dir, "net.d")
	unready := func(want ...string) {
		t.Helper()
		err := n.Status(t.Context())
		if !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("status: %v, want failed precondition", err)
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("status: %v, want %q in it", err, w)
			}
		}
		if _, serr := n.Setup(t.Context(), n.pod(1)); serr == nil {
			t.Error("setup works though the status says it won't")
		}
	}
	unready(conf, "10-caisson.conflist")
	n.write(t, "net.d/20-second.conflist", named("second"), 0o644)
	if err := n.Status(t.Context()); err != nil {
		t.Errorf("status: %v", err)
	}
	n.write(t, "net.d/10-first.conflist", strings.Replace(named("first"), "host-local", "no-such-ipam", 1), 0o644)
	unready("no-such-ipam", debianPlugins, "install")
	n.write(t, "net.d/10-first.conflist", "{", 0o644)
	unready("10-first.conflist", "repair")
	n.write(t, "net.d/10-first.conflist", `{"name": "../x", "cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}`, 0o644)
	unready("10-first.conflist", "../x")
	n.write(t, "net.d/10-first.conflist", `{"name": "empty", "cniVersion": "1.0.0", "plugins": []}`, 0o644)
	unready("10-first.conflist")
	if err := os.RemoveAll(conf); err != nil {
		t.Fatal(err)
	}
	unready(conf)
}

// A plugin that does not delegate may have any name for its IPAM.
func TestStatusOfOwnIPAM(t *testing.T) {
	n := newNode(t)
	n.script(t, "azure-vnet", "exit 0")
	n.write(t, "net.d/10-azure.conflist", `{"cniVersion": "0.3.0", "name": "azure", "plugins": [
		{"type": "azure-vnet", "mode": "transparent", "ipam": {"type": "azure-cns"}}]}`, 0o644)
	if err := n.Status(t.Context()); err != nil {
		t.Errorf("status: %v", err)
	}
}

func TestStatusAsksThePlugins(t *testing.T) {
	n := newScriptNode(t, "1.1.0", `test -e $(dirname $0)/../up || { echo '{"code": 50, "msg": "the daemon is down"}'; exit 1; }`)
	if err := n.Status(t.Context()); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "the daemon is down") {
		t.Errorf("status: %v, want the plugin's reason", err)
	}
	n.write(t, "up", "", 0o644)
	if err := n.Status(t.Context()); err != nil {
		t.Errorf("status: %v", err)
	}
	if got := n.calls(t); got != "STATUS STATUS" {
		t.Errorf("called %s", got)
	}
}

func TestFirstConfigurationByNameCounts(t *testing.T) {
	n := newNode(t)
	want := func(name string) {
		t.Helper()
		list, err := n.config()
		if err != nil {
			t.Fatal(err)
		}
		if list.Name != name {
			t.Errorf("network %s, want %s", list.Name, name)
		}
	}
	n.write(t, "net.d/20-b.conflist", named("b"), 0o644)
	n.write(t, "net.d/README", "not a configuration", 0o644)
	n.write(t, "net.d/00-a.conflist.swp", "{", 0o644)
	want("b")
	n.write(t, "net.d/10-a.conf", `{"cniVersion": "1.0.0", "name": "a", "type": "bridge"}`, 0o644)
	want("a")
	n.write(t, "net.d/10-a.conf", `{"cniVersion": "1.0.0", "name": "changed", "type": "bridge"}`, 0o644)
	want("changed")
	if err := os.Remove(filepath.Join(n.dir, "net.d/10-a.conf")); err != nil {
		t.Fatal(err)
	}
	want("b")
}

func TestDeployedConfigurationIsValid(t *testing.T) {
	n := newNode(t)
	data, err := os.ReadFile("../deploy/10-caisson.conflist")
	if err != nil {
		t.Fatal(err)
	}
	n.write(t, "net.d/10-caisson.conflist", string(data), 0o644)
	if err := n.Status(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestQuantity(t *testing.T) {
	for text, want := range map[string]float64{
		"10M": 1e7, "1.5G": 1.5e9, "1Mi": 1 << 20, "2e6": 2e6, "2E3": 2e3, "1000": 1000, "3k": 3000, "1P": 1e15, "1000000m": 1000,
	} {
		if got, err := quantity(text); err != nil || got != want {
			t.Errorf("%s: %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "M", "10 M", "10Mb", "0x10", "1_000", "NaN", "Inf", "ten", "10KiB", "--1", "1e999"} {
		if got, err := quantity(text); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, %v; want invalid argument", text, got, err)
		}
	}
	for _, text := range []string{"999", "2P", "-10M"} {
		if _, err := bandwidth(map[string]string{egressAnnotation: text}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want invalid argument", text, err)
		}
	}
}
