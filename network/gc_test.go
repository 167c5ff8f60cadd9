package network

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestGCRemovesWhatHasNoPod(t *testing.T) {
	n := newBridgeNode(t)
	for i := range 3 {
		n.setup(t, n.pod(i))
	}
	if err := n.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := n.Check(t.Context(), n.pod(i).ID); err != nil {
			t.Errorf("a pod of this daemon, which no list can know of in time, was hurt: %v", err)
		}
	}
	n.CNI = New(n.o) // the next daemon, with one record
	if err := n.GC(t.Context(), []string{n.pod(1).ID}); err != nil {
		t.Fatal(err)
	}
	if err := n.Check(t.Context(), n.pod(1).ID); err != nil {
		t.Errorf("the listed pod was hurt: %v", err)
	}
	for _, i := range []int{0, 2} {
		if n.knows(n.pod(i).ID) {
			t.Errorf("pod %d is still there", i)
		}
	}
	n.teardown(t, n.pod(1).ID)
}

func TestGCAsksThePlugins(t *testing.T) {
	n := newScriptNode(t, "1.1.0", `cat >$(dirname $0)/../stdin`)
	if err := n.GC(t.Context(), []string{"kept"}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(n.dir, "stdin"))
	if err != nil {
		t.Fatal(err)
	}
	if want := `"cni.dev/valid-attachments":[{"containerID":"kept","ifname":"eth0"}]`; !strings.Contains(string(data), want) {
		t.Errorf("the plugin got %s, want %s in it", data, want)
	}
	if got := n.calls(t); got != "GC" {
		t.Errorf("called %s", got)
	}
	n.gate.RLock() // as ADD holds it
	err = n.GC(t.Context(), nil)
	n.gate.RUnlock()
	if !errdefs.IsUnavailable(err) {
		t.Errorf("gc beside an ADD: %v, want unavailable", err)
	}
}

func TestGCWithoutConfiguration(t *testing.T) {
	n := newNode(t)
	if err := n.GC(t.Context(), nil); err != nil {
		t.Error(err)
	}
}
