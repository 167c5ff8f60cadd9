package network

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
)

func TestSetupTellsWhatTheGuestMustBeLike(t *testing.T) {
	n := newBridgeNode(t)
	a := n.setup(t, n.pod(1))
	defer n.teardown(t, n.pod(1).ID)
	if len(a.Interfaces) != 1 {
		t.Fatalf("interfaces %+v, want one", a.Interfaces)
	}
	got := a.Interfaces[0]
	if _, err := net.ParseMAC(got.MAC); err != nil {
		t.Error(err)
	}
	gw6 := netip.MustParsePrefix(n.subnet6).Addr().Next()
	want := Interface{
		Name: "eth0", Tap: "caisson0", MAC: got.MAC, MTU: 1500,
		Addresses: []string{nth(n.subnet4, 2), nth(n.subnet6, 2)},
		Routes: []Route{
			{Destination: "0.0.0.0/0", Gateway: n.gateway},
			{Destination: "::/0", Gateway: gw6.String(), Metric: 1024},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("interface\n%+v, want\n%+v", got, want)
	}
	if err := inNetNS(a.NetNS, func() error {
		for _, name := range []string{"lo", "eth0", "caisson0"} {
			l, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			if l.Flags&net.FlagUp == 0 || (name != "lo" && l.MTU != 1500) {
				t.Errorf("%s: %v, mtu %d", name, l.Flags, l.MTU)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// nth is the i-th address of a subnet, as a CIDR.
func nth(subnet string, i int) string {
	p := netip.MustParsePrefix(subnet)
	a := p.Addr()
	for range i {
		a = a.Next()
	}
	return netip.PrefixFrom(a, p.Bits()).String()
}

func TestMTU(t *testing.T) {
	n := newNode(t)
	n.configure(t, map[string]any{"cniVersion": "1.0.0", "name": "jumbo", "plugins": []map[string]any{{
		"type": "bridge", "bridge": n.bridge, "mtu": 8900,
		"ipam": map[string]any{"type": "host-local", "dataDir": n.ipamDir(), "subnet": n.subnet4},
	}}})
	a := n.setup(t, n.pod(1))
	defer n.teardown(t, n.pod(1).ID)
	if a.Interfaces[0].MTU != 8900 {
		t.Errorf("mtu %d, want 8900", a.Interfaces[0].MTU)
	}
	if err := inNetNS(a.NetNS, func() error {
		tap, err := net.InterfaceByName(a.Interfaces[0].Tap)
		if err == nil && tap.MTU != 8900 {
			t.Errorf("mtu of the tap %d, want 8900", tap.MTU)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// The ptp plugin replaces the route of the subnet by one through the gateway; no neighbour could
// be reached if the guest's kernel made it again.
func TestPointToPoint(t *testing.T) {
	n := newNode(t)
	n.configure(t, map[string]any{"cniVersion": "1.0.0", "name": "ptp", "plugins": []map[string]any{{
		"type": "ptp",
		"ipam": map[string]any{
			"type": "host-local", "dataDir": n.ipamDir(),
			"ranges": [][]map[string]string{{{"subnet": n.subnet4}}, {{"subnet": n.subnet6}}},
			"routes": []map[string]string{{"dst": "0.0.0.0/0"}},
		},
	}}})
	a := n.setup(t, n.pod(1))
	defer n.teardown(t, n.pod(1).ID)
	ips := a.IPs()
	i := a.Interfaces[0]
	if want := []string{ips[0] + "/32", ips[1] + "/128"}; !slices.Equal(i.Addresses, want) {
		t.Errorf("addresses %v, want %v: without their subnets", i.Addresses, want)
	}
	var got []string
	for _, r := range i.Routes {
		got = append(got, strings.TrimSpace(r.Destination+" "+r.Gateway))
	}
	slices.Sort(got[2:]) // behind the two on the link
	gw6, _, _ := strings.Cut(nth(n.subnet6, 1), "/")
	want := []string{
		n.gateway + "/32", gw6 + "/128",
		"0.0.0.0/0 " + n.gateway, n.subnet4 + " " + n.gateway, n.subnet6 + " " + gw6,
	}
	if !slices.Equal(got, want) {
		t.Errorf("routes %v, want %v", got, want)
	}
	g := newGuest(t, n, a)
	for _, addr := range g.addrs {
		answered(t, addr)
	}
	// ptp waits until its IPv6 address is known to be no duplicate, two seconds if it is probed.
	if err := inNetNS(a.NetNS, func() error {
		dad, err := os.ReadFile("/proc/sys/net/ipv6/conf/eth0/accept_dad")
		if strings.TrimSpace(string(dad)) != "0" {
			t.Errorf("accept_dad is %s", dad)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// empty leaves a namespace as it is.
func empty(*netlink.Handle) error { return nil }

func TestCheck(t *testing.T) {
	n := newBridgeNode(t)
	a := n.setup(t, n.pod(1))
	if err := n.Check(t.Context(), n.pod(1).ID); err != nil {
		t.Errorf("check of a pod just set up: %v", err)
	}
	if err := inNetNS(a.NetNS, func() error {
		return netlink.RouteDel(&netlink.Route{Gw: net.ParseIP(n.gateway)})
	}); err != nil {
		t.Fatal(err)
	}
	if err := n.Check(t.Context(), n.pod(1).ID); err == nil {
		t.Error("check is content though the default route is gone")
	}
	n.teardown(t, n.pod(1).ID)
	if err := n.Check(t.Context(), n.pod(1).ID); !errdefs.IsNotFound(err) {
		t.Errorf("check after teardown: %v, want not found", err)
	}
}

func TestSetupTwice(t *testing.T) {
	n := newBridgeNode(t)
	n.setup(t, n.pod(1))
	if _, err := n.Setup(t.Context(), n.pod(1)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second setup: %v, want already exists", err)
	}
	if err := n.Check(t.Context(), n.pod(1).ID); err != nil {
		t.Errorf("the second setup harmed the first: %v", err)
	}
	n.teardown(t, n.pod(1).ID)
	n.teardown(t, n.pod(1).ID)
	n.wantNothingLeft(t)
	n.setup(t, n.pod(1))
	n.teardown(t, n.pod(1).ID)
}

func TestTeardownOfTheUnknown(t *testing.T) {
	n := newNode(t) // not even a configuration
	n.teardown(t, n.pod(1).ID)
}

func TestOpenTap(t *testing.T) {
	n := newBridgeNode(t)
	a := n.setup(t, n.pod(1))
	f, err := n.OpenTap(a, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.OpenTap(a, 0); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a tap in use: %v, want failed precondition", err)
	}
	f.Close()
	if f, err = n.OpenTap(a, 0); err != nil {
		t.Errorf("the tap is free again: %v", err)
	} else {
		f.Close()
	}
	if _, err := n.OpenTap(a, 1); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no such interface: %v, want invalid argument", err)
	}
	lost := *a
	lost.Interfaces = []Interface{{Tap: "caisson7"}}
	if _, err := n.OpenTap(&lost, 0); !errdefs.IsNotFound(err) {
		t.Errorf("no such tap: %v, want not found", err)
	}
	n.teardown(t, n.pod(1).ID)
	if _, err := n.OpenTap(a, 0); !errdefs.IsNotFound(err) {
		t.Errorf("no such namespace: %v, want not found", err)
	}
}

func TestInvalidPods(t *testing.T) {
	n := newBridgeNode(t)
	for name, change := range map[string]func(*Pod){
		"no id":            func(p *Pod) { p.ID = "" },
		"a path":           func(p *Pod) { p.ID = "../../etc" },
		"an endless id":    func(p *Pod) { p.ID = strings.Repeat("a", 200) },
		"an argument more": func(p *Pod) { p.Name = "web;K8S_POD_NAME=other" },
		"protocol":         func(p *Pod) { p.PortMappings = []PortMapping{{Protocol: "icmp", HostPort: 1, ContainerPort: 1}} },
		"port":             func(p *Pod) { p.PortMappings = []PortMapping{{Protocol: "tcp", HostPort: 70000, ContainerPort: 1}} },
		"bandwidth":        func(p *Pod) { p.Annotations = map[string]string{ingressAnnotation: "fast"} },
	} {
		t.Run(name, func(t *testing.T) {
			p := n.pod(1)
			change(&p)
			if _, err := n.Setup(t.Context(), p); !errdefs.IsInvalidArgument(err) {
				t.Errorf("setup: %v, want invalid argument", err)
			}
		})
	}
}

func TestManyPodsAtOnceLeakNothing(t *testing.T) {
	n := newBridgeNode(t)
	round := func() {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				a, err := n.Setup(t.Context(), n.pod(i))
				if err != nil {
					t.Error(err)
					return
				}
				f, err := n.OpenTap(a, 0)
				if err != nil {
					t.Error(err)
				} else {
					f.Close()
				}
				if err := n.Teardown(t.Context(), Pod{ID: n.pod(i).ID}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	round()
	fds, home := openFiles(t), namespaces(t)
	round()
	n.wantNothingLeft(t)
	if now := openFiles(t); now > fds {
		t.Errorf("%d open files, %d before", now, fds)
	}
	if now := namespaces(t); len(now) != 1 || !reflect.DeepEqual(now, home) {
		t.Errorf("threads are in the namespaces %v, before in %v", now, home)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// namespaces are the network namespaces that this process's threads are in.
func namespaces(t *testing.T) map[string]bool {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	in := map[string]bool{}
	for _, task := range tasks {
		if ns, err := os.Readlink(task); err == nil {
			in[ns] = true
		}
	}
	return in
}

func BenchmarkSetup(b *testing.B) {
	n := newBridgeNode(b)
	i := 0
	for b.Loop() {
		i++
		p := n.pod(i%200 + 1)
		n.setup(b, p)
		b.StopTimer()
		n.teardown(b, p.ID)
		b.StartTimer()
	}
}
