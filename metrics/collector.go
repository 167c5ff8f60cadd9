package metrics

import (
	"maps"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caisson-vm/caisson/podvm"
)

// Sources are asked at each scrape. They must not block.
type Sources struct {
	Pods       func() []podvm.PodStatus
	Containers func() []podvm.ContainerStatus
	// Images returns how many there are, and the bytes they take on the disk.
	Images func() (n int, bytes uint64, err error)
	// Templates returns the same of templates.
	Templates func() (n int, bytes int64)
	// Starting returns how many pods are being started, by phase.
	Starting func() map[string]int
	// Warm returns how many clones are ready for pods to come.
	Warm func() int
}

type collector struct {
	sources Sources

	mu    sync.Mutex
	seen  map[int]usage      // by pid, as of the last scrape
	ended map[string]float64 // CPU seconds, by driver
}

type usage struct {
	driver string
	cpu    float64
}

func newCollector(s Sources) *collector {
	return &collector{sources: s, seen: map[int]usage{}, ended: map[string]float64{}}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, f := range []family{pods, containers, vmmMemory, vmmCPU, images, storeBytes, templates, templateBytes, warm, starting} {
		out <- f.desc()
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	all := c.sources.Pods()
	c.collectPods(out, all)
	c.collectVMMs(out, all)
	states := map[string]float64{string(podvm.Created): 0, string(podvm.Running): 0, string(podvm.Exited): 0, string(podvm.Unknown): 0}
	for _, s := range c.sources.Containers() {
		states[string(s.State)]++
	}
	for state, n := range states {
		gauge(out, containers, n, state)
	}
	n, bytes, err := c.sources.Images()
	if err != nil {
		out <- prometheus.NewInvalidMetric(storeBytes.desc(), err)
	} else {
		gauge(out, images, float64(n))
		gauge(out, storeBytes, float64(bytes))
	}
	made, size := c.sources.Templates()
	gauge(out, templates, float64(made))
	gauge(out, templateBytes, float64(size))
	gauge(out, warm, float64(c.sources.Warm()))
	for phase, n := range c.sources.Starting() {
		gauge(out, starting, float64(n), phase)
	}
}

func (c *collector) collectPods(out chan<- prometheus.Metric, all []podvm.PodStatus) {
	type key struct{ state, driver, guest string }
	count := map[key]float64{}
	for _, p := range all {
		count[key{string(podvm.Ready), p.Driver, p.Guest}] += 0
		count[key{string(p.State), p.Driver, p.Guest}]++
	}
	for k, n := range count {
		gauge(out, pods, n, k.state, k.driver, k.guest)
	}
}

// collectVMMs adds up the VMM processes. Processes end between scrapes; what was last seen of
// their CPU time stays counted, so that the counter never falls.
func (c *collector) collectVMMs(out chan<- prometheus.Metric, all []podvm.PodStatus) {
	memory := map[string]float64{}
	now := map[int]usage{}
	for _, p := range all {
		if p.VMM.PID == 0 || p.VMM.Err != nil {
			continue
		}
		m, cpu, err := process(p.VMM.PID)
		if err != nil {
			continue // it has ended just now
		}
		memory[p.Driver] += m
		now[p.VMM.PID] = usage{p.Driver, cpu}
	}
	for driver, bytes := range memory {
		gauge(out, vmmMemory, bytes, driver)
	}
	for driver, seconds := range c.add(now) {
		out <- prometheus.MustNewConstMetric(vmmCPU.desc(), prometheus.CounterValue, seconds, driver)
	}
}

// add returns the CPU seconds by driver, with those of processes that have ended since.
func (c *collector) add(now map[int]usage) map[string]float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	for pid, was := range c.seen {
		if is, ok := now[pid]; !ok || is.cpu < was.cpu { // less: the number was given to another
			c.ended[was.driver] += was.cpu
		}
	}
	c.seen = now
	total := maps.Clone(c.ended)
	for _, u := range now {
		total[u.driver] += u.cpu
	}
	return total
}

func gauge(out chan<- prometheus.Metric, f family, value float64, labels ...string) {
	out <- prometheus.MustNewConstMetric(f.desc(), prometheus.GaugeValue, value, labels...)
}
