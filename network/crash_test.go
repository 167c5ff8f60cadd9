package network

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Whatever a dead daemon or a reboot has left of a pod, its id is enough to remove it.
func TestTeardownAfterACrash(t *testing.T) {
	for name, crash := range map[string]func(*testing.T, *node, Pod){
		"before the namespace": func(t *testing.T, n *node, p Pod) { n.record(t, p) },
		"before its mount": func(t *testing.T, n *node, p Pod) {
			n.record(t, p)
			if err := os.MkdirAll(n.o.NetNSDir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(n.netnsPath(p.ID), nil, 0o444); err != nil {
				t.Fatal(err)
			}
		},
		"before ADD": func(t *testing.T, n *node, p Pod) {
			n.record(t, p)
			if err := createNetNS(n.netnsPath(p.ID), empty); err != nil {
				t.Fatal(err)
			}
		},
		"before ADD's result was kept": func(t *testing.T, n *node, p Pod) {
			n.setup(t, p)
			if err := os.RemoveAll(filepath.Join(n.o.CacheDir, "results")); err != nil {
				t.Fatal(err)
			}
		},
		"before the daemon knew": func(t *testing.T, n *node, p Pod) { n.setup(t, p) },
		"with its record torn": func(t *testing.T, n *node, p Pod) {
			n.setup(t, p)
			if err := os.Truncate(n.recordPath(p.ID), 0); err != nil {
				t.Fatal(err)
			}
		},
		"with its record gone": func(t *testing.T, n *node, p Pod) {
			n.setup(t, p)
			if err := os.Remove(n.recordPath(p.ID)); err != nil {
				t.Fatal(err)
			}
		},
		"with the configuration changed since": func(t *testing.T, n *node, p Pod) {
			n.setup(t, p)
			n.write(t, "net.d/00-new.conflist", "{", 0o644)
		},
		"of a teardown": func(t *testing.T, n *node, p Pod) {
			n.setup(t, p)
			if err := n.del(t.Context(), p); err != nil {
				t.Fatal(err)
			}
		},
		"of a teardown, later": func(t *testing.T, n *node, p Pod) {
			n.setup(t, p)
			if err := n.del(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			if err := deleteNetNS(n.netnsPath(p.ID)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newBridgeNode(t)
			p := n.pod(1)
			p.PortMappings = []PortMapping{{Protocol: "tcp", ContainerPort: 80, HostPort: 18081}}
			crash(t, n, p)
			n.CNI = New(n.o) // the next daemon
			n.teardown(t, p.ID)
			n.wantNothingLeft(t)
			n.teardown(t, p.ID)
		})
	}
}

// record writes what Setup writes first.
func (n *node) record(t *testing.T, p Pod) {
	t.Helper()
	list, err := n.config()
	if err != nil {
		t.Fatal(err)
	}
	rt, err := runtimeConf(p, n.netnsPath(p.ID))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.writeRecord(list, rt); err != nil {
		t.Fatal(err)
	}
}

// A reboot takes mounts, interfaces and rules; the plugins' reservations stay, and so does the
// file in a NetNSDir that isn't a tmpfs.
func TestTeardownAfterAReboot(t *testing.T) {
	n := newBridgeNode(t)
	p := n.pod(1)
	a := n.setup(t, p)
	rules := n.rules(t)
	if err := unix.Unmount(a.NetNS, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	n.flushRules(t)
	n.CNI = New(n.o)
	if err := n.Check(t.Context(), p.ID); err == nil {
		t.Error("check is content without a namespace")
	}
	n.teardown(t, p.ID)
	n.wantNothingLeft(t)
	if rules == "" {
		t.Error("the pod had no rules; what is this test worth?")
	}
}

// The record must give back what ADD was called with, through JSON.
func TestRecordRoundTrip(t *testing.T) {
	n := newBridgeNode(t)
	p := n.pod(1)
	p.PortMappings = []PortMapping{{Protocol: "udp", ContainerPort: 53, HostPort: 18053, HostIP: "127.0.0.1"}}
	p.Annotations = map[string]string{ingressAnnotation: "1P"}
	p.DNS = DNS{Servers: []string{"192.0.2.53"}}
	n.record(t, p)
	list, err := n.config()
	if err != nil {
		t.Fatal(err)
	}
	rt, err := runtimeConf(p, n.netnsPath(p.ID))
	if err != nil {
		t.Fatal(err)
	}
	gotList, gotRT, err := n.readRecord(p.ID)
	if err != nil {
		t.Fatal(err)
	}
	wantJSON(t, gotRT, rt)
	gotList.Bytes, list.Bytes = nil, nil // the list's own text is not its plugins'
	wantJSON(t, gotList, list)
	n.teardown(t, p.ID)
}
