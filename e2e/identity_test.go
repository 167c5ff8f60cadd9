package e2e

import (
	"strings"
	"sync"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testIdentity starts pods at once, clones of one VM: nothing random may be the same in two of them.
func testIdentity(t *testing.T, d *harness.Daemon) {
	d.RunPod() // from here on there is a template
	cold := strings.Count(d.Log(), "booted cold")
	pods := atOnce(t, d, 6)
	if n := strings.Count(d.Log(), "booted cold") - cold; n > 0 {
		t.Errorf("%d of the pods are no clones", n)
	}
	differ(t, pods)
}

// TestIdentityOfWarm is the same for pods that become clones that ran before they were asked for.
func TestIdentityOfWarm(t *testing.T) {
	const n = 4
	d := harness.Start(t, func(c *harness.Config) { c.VM.Warm, c.Metrics.Listen = n, metricsAddr })
	if err := d.AwaitWarm(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	pods := atOnce(t, d, n)
	text, err := page("http://" + metricsAddr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	has(t, text, started("warm", n))
	differ(t, pods)
}

// atOnce runs so many pods at the same time.
func atOnce(t *testing.T, d *harness.Daemon, n int) []*harness.Pod {
	t.Helper()
	pods := make([]*harness.Pod, n)
	var group sync.WaitGroup
	for i := range pods {
		config := d.PodConfig(func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{Privileged: true}
		})
		group.Go(func() {
			var err error
			if pods[i], err = d.TryRunPod(config); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	for _, pod := range pods {
		if pod != nil {
			t.Cleanup(pod.Remove)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	return pods
}

// differ sees that nothing that is random, or names a machine, is the same in two pods, or twice in one.
func differ(t *testing.T, pods []*harness.Pod) {
	t.Helper()
	const random = "/proc/sys/kernel/random/"
	sources := []string{random + "uuid", random + "boot_id", "/dev/urandom", "/dev/random", "/proc/1/root/run/caisson/machine-id"}
	seesGuest := func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{
			Privileged: true, NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE},
		}
	}
	seen := map[string]string{}
	for _, pod := range pods {
		script := "for f in " + strings.Join(sources, " ") + "; do head -c 36 $f | base64 -w 0; echo; done"
		c := pod.Run(images.Busybox, harness.Shell(script), seesGuest)
		c.Wait()
		values := strings.Fields(c.Output("stdout"))
		if len(values) != len(sources) {
			t.Fatalf("got %q, want a line each of %q", values, sources)
		}
		for i, value := range values {
			if other, ok := seen[value]; ok {
				t.Errorf("%s of pod %s is the same as %s", sources[i], pod.ID, other)
			}
			seen[value] = sources[i] + " of pod " + pod.ID
		}
	}
}
