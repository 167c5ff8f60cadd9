package e2e

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
	"github.com/caisson-vm/caisson/e2e/images"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestTemplateOfNamespace: pods of one namespace are clones of one template, those of another of
// another, and none boots.
func TestTemplateOfNamespace(t *testing.T) {
	d := harness.Start(t, func(c *harness.Config) { c.VM.Template, c.Metrics.Listen = "namespace", metricsAddr })
	for i, namespace := range []string{"north", "north", "south", "south", "north"} {
		pod := d.RunPod(func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Namespace = namespace })
		templates, err := filepath.Glob(filepath.Join(d.Config.Root, "templates", "*"))
		if want := min(i/2+1, 2); err != nil || len(templates) != want {
			t.Errorf("%d templates after pod %d of namespace %s, %v, want %d", len(templates), i, namespace, err, want)
		}
		pod.Run(images.Busybox, sleeper).Exec("true")
	}
	text, err := page("http://" + metricsAddr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	has(t, text, started("clone", 5), started("boot", 0), "\ncaisson_templates 2\n")
}

// started is the metric of pods that have started.
func started(origin string, n int) string {
	return fmt.Sprintf("\ncaisson_pod_starts_total{origin=%q} %d\n", origin, n)
}
