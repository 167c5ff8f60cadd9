package e2e

import (
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
)

// TestWarm: a pod becomes the clone that was kept ready, and is like any other.
func TestWarm(t *testing.T) {
	d := harness.Start(t, func(c *harness.Config) { c.VM.Warm, c.Metrics.Listen = 1, metricsAddr })
	await := func() {
		t.Helper()
		if err := d.AwaitWarm(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
	}
	await()
	config := d.PodConfig()
	config.Hostname = "named-by-the-pod"
	pod, err := d.TryRunPod(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pod.Remove)
	if !strings.Contains(d.Log(), "origin=warm") {
		t.Errorf("the pod did not come from the pool:\n%s", d.Log())
	}
	c := pod.Run(images.Busybox, sleeper)
	if out := c.Exec("hostname"); out != "named-by-the-pod\n" {
		t.Errorf("its host name is %q", out)
	}
	if ip, out := pod.Status().Network.Ip, c.Exec("ip", "addr", "show", "eth0"); ip == "" || !strings.Contains(out, ip+"/") {
		t.Errorf("its address is not %s:\n%s", ip, out)
	}
	await() // the next one
	ready := vms(t)
	d.Restart() // killed: what was in the pool is taken back, and made anew
	await()
	if now := vms(t); len(now) != 2 || len(ready) != 2 {
		t.Errorf("%d VMs before the daemon was killed, %d after it came back, want 2: the pod's and the next one's", len(ready), len(now))
	}
	if out := c.Exec("echo", "alive"); out != "alive\n" {
		t.Errorf("after the restart: %q", out)
	}
}
