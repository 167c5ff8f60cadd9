// Package metrics is the daemon's Prometheus endpoint. Every metric is declared in families below,
// which docs/METRICS.md is made from; labels have few values, none of them from pods or images.
package metrics

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/podvm"
)

// family declares a metric.
type family struct {
	name, kind, help string
	labels           []string
	buckets          []float64
}

// The metrics, by what they tell.
var (
	calls = family{"caisson_cri_request_duration_seconds", "histogram",
		"Time that CRI calls took, by method and gRPC code.", []string{"method", "code"}, exponential}
	phases = family{"caisson_pod_start_phase_duration_seconds", "histogram",
		"Time that the phases of a pod's start took, by result: ok or error (also of what was given up); phases overlap, \"total\" is all of it, with what takes back a start that failed.", []string{"phase", "result"}, exponential}
	starts = family{"caisson_pod_starts_total", "counter",
		"Pods that have started, by what their VM was when it was asked for: warm (it ran already), clone (of a template) or boot.", []string{"origin"}, nil}
	starting = family{"caisson_pods_starting", "gauge",
		"Pods that are being started, by the phase that runs for the longest time.", []string{"phase"}, nil}
	losses = family{"caisson_pod_losses_total", "counter",
		"Pods that lost their VM although nobody asked for it, by reason: VMGone (it ended), OOMKilled (the node had no memory for it) or Unreachable (its guest did not answer). The log says more.", []string{"reason"}, nil}
	pulls = family{"caisson_image_pull_duration_seconds", "histogram",
		"Time that image pulls took, by result: ok, cached (only the manifest was fetched) or error.", []string{"result"}, minutes}
	downloaded = family{"caisson_image_download_bytes_total", "counter",
		"Bytes of image layers received from registries.", nil, nil}
	fallbacks = family{"caisson_template_fallbacks_total", "counter",
		"Pods that were booted cold because no clone of a template could be had. The log says why.", nil, nil}
	build = family{"caisson_build_info", "gauge",
		"1, with the daemon's version, the VM driver in use, how its VMs run (kvm or emulation) and the version of the guest.", []string{"version", "driver", "acceleration", "guest"}, nil}

	pods = family{"caisson_pods", "gauge",
		"Pods, by state, VM driver and the version of the guest that they run, which an update changes for new pods only; empty where it was not recorded.", []string{"state", "driver", "guest"}, nil}
	containers = family{"caisson_containers", "gauge",
		"Containers, by state.", []string{"state"}, nil}
	vmmMemory = family{"caisson_vmm_memory_bytes", "gauge",
		"Memory of all VMM processes with their guests: proportional set size, in which pages that pods share count once.", []string{"driver"}, nil}
	vmmCPU = family{"caisson_vmm_cpu_seconds_total", "counter",
		"CPU time of all VMM processes with their guests, those that have ended included as far as they were seen.", []string{"driver"}, nil}
	images = family{"caisson_images", "gauge",
		"Images in the store.", nil, nil}
	storeBytes = family{"caisson_image_store_bytes", "gauge",
		"What the image store takes on the disk.", nil, nil}
	templates = family{"caisson_templates", "gauge",
		"Templates that pods are cloned from, as they are in their folder.", nil, nil}
	warm = family{"caisson_warm_clones", "gauge",
		"Clones that are ready for pods to come.", nil, nil}
	templateBytes = family{"caisson_template_bytes", "gauge",
		"What the templates take on the disk, with those that are being made.", nil, nil}
)

// families is all of them, in the order of docs/METRICS.md.
var families = []family{
	calls, phases, starting, starts, losses, pods, containers, vmmMemory, vmmCPU, pulls, downloaded, images, storeBytes, templates, templateBytes, warm, fallbacks, build,
}

// Buckets in seconds.
var (
	exponential = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
	minutes     = []float64{.1, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600}
)

func (f family) desc() *prometheus.Desc {
	return prometheus.NewDesc(f.name, f.help, f.labels, nil)
}

func (f family) histogram() *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: f.name, Help: f.help, Buckets: f.buckets}, f.labels)
}

func (f family) counter() prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: f.name, Help: f.help})
}

// counters is a counter for each value of the family's one label, all of which are there from the start.
func (f family) counters(values ...string) *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: f.name, Help: f.help}, f.labels)
	for _, value := range values {
		v.WithLabelValues(value)
	}
	return v
}

// Metrics counts what happens. Its methods may be called concurrently.
type Metrics struct {
	registry              *prometheus.Registry
	calls, phases, pulls  *prometheus.HistogramVec
	starts, losses        *prometheus.CounterVec
	downloaded, fallbacks prometheus.Counter
}

// New makes the metrics of one daemon. What it is given is for caisson_build_info.
func New(version, driver, acceleration, guest string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		calls:    calls.histogram(), phases: phases.histogram(), pulls: pulls.histogram(),
		downloaded: downloaded.counter(), fallbacks: fallbacks.counter(),
		starts: starts.counters("warm", "clone", "boot"), losses: losses.counters("VMGone", "OOMKilled", "Unreachable"),
	}
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: build.name, Help: build.help}, build.labels)
	info.WithLabelValues(version, driver, acceleration, guest).Set(1)
	m.registry.MustRegister(m.calls, m.phases, m.starts, m.losses, m.pulls, m.downloaded, m.fallbacks, info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Collect adds the state of pods and stores, which is read at each scrape.
func (m *Metrics) Collect(s Sources) { m.registry.MustRegister(newCollector(s)) }

// Handler serves the metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry, EnableOpenMetrics: true, MaxRequestsInFlight: 4, Timeout: 30 * time.Second})
}

// ObserveCall implements server.Observer.
func (m *Metrics) ObserveCall(method, code string, took time.Duration) {
	m.calls.WithLabelValues(method, code).Observe(took.Seconds())
}

// ObservePull takes the end of an image pull; it fits imagestore.Options.Pulled.
func (m *Metrics) ObservePull(r imagestore.PullResult) {
	result := "ok"
	switch {
	case r.Err != nil:
		result = "error"
	case r.Cached:
		result = "cached"
	}
	m.pulls.WithLabelValues(result).Observe(r.Took.Seconds())
	m.downloaded.Add(float64(r.Downloaded))
}

// ObserveStart takes a pod's start: what its VM was, and the phases.
func (m *Metrics) ObserveStart(origin string, all []podvm.Phase) {
	m.starts.WithLabelValues(origin).Inc()
	m.observePhases(all)
}

// ObserveFailedStart takes the phases of a start that came to nothing.
func (m *Metrics) ObserveFailedStart(all []podvm.Phase) { m.observePhases(all) }

func (m *Metrics) observePhases(all []podvm.Phase) {
	for _, p := range all {
		result := "ok"
		if p.Failed {
			result = "error"
		}
		m.phases.WithLabelValues(p.Name, result).Observe(p.Took.Seconds())
	}
}

// ObserveFallback counts a pod that was booted cold although it should have been a clone.
func (m *Metrics) ObserveFallback() { m.fallbacks.Inc() }

// ObserveLoss counts a pod that lost its VM.
func (m *Metrics) ObserveLoss(reason string) { m.losses.WithLabelValues(reason).Inc() }
