package e2e

import (
	"strings"
	"sync"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
)

// testIdentity starts pods at once, clones of one VM: nothing random may be the same in two of them.
func testIdentity(t *testing.T, d *harness.Daemon) {
	d.RunPod() // from here on there is a template
	cold := strings.Count(d.Log(), "booted cold")
	pods := make([]*harness.Pod, 6)
	var group sync.WaitGroup
	for i := range pods {
		config := d.PodConfig()
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
		return
	}
	if n := strings.Count(d.Log(), "booted cold") - cold; n > 0 {
		t.Errorf("%d of the pods are no clones", n)
	}
	const random = "/proc/sys/kernel/random/"
	sources := []string{random + "uuid", random + "boot_id", "/dev/urandom", "/dev/random"}
	seen := map[string]string{}
	for _, pod := range pods {
		script := "for f in " + strings.Join(sources, " ") + "; do head -c 36 $f | base64 -w 0; echo; done"
		c := pod.Run(images.Busybox, harness.Shell(script))
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
