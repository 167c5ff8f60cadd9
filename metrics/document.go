package metrics

import (
	"fmt"
	"strings"
)

// Document is docs/METRICS.md.
func Document() string {
	var b strings.Builder
	b.WriteString(`# Metrics
At http://127.0.0.1:9477/metrics (key ` + "`metrics.listen`" + `), beside those of the Go runtime (go_*) and of the daemon's process (process_*). No label has a value that comes from a pod or an image; what belongs to one pod is in the CRI's stats and metrics. The kubelet asks for these with its feature gate ` + "`PodAndContainerStatsFromCRI`" + `, and serves them as container_* on /metrics/cadvisor, and on /stats/summary; without the gate it asks cAdvisor, which sees no containers in VMs.

| metric | type | labels | |
| --- | --- | --- | --- |
`)
	for _, f := range families {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.name, f.kind, strings.Join(f.labels, ", "), f.help)
	}
	return b.String()
}
