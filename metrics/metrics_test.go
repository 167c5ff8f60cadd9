package metrics

import (
	"errors"
	"flag"
	"io"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/caisson-vm/caisson/imagestore"
	"github.com/caisson-vm/caisson/podvm"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

var update = flag.Bool("update", false, "write docs/METRICS.md")

func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body, err := io.ReadAll(w.Body)
	if err != nil || w.Code != 200 {
		t.Fatalf("status %d, %v: %s", w.Code, err, body)
	}
	return string(body)
}

// filled has a value in each family.
func filled() *Metrics {
	m := New("v1", "qemu", "kvm", "g1")
	m.ObserveCall("RunPodSandbox", "OK", time.Second)
	m.ObserveStart("clone", []podvm.Phase{{Name: "cni", Took: time.Second}})
	m.ObserveFailedStart([]podvm.Phase{{Name: "guest", Took: time.Second}, {Name: "cni", Took: 2 * time.Second, Failed: true}})
	m.ObservePull(imagestore.PullResult{Downloaded: 7, Took: time.Second})
	m.ObservePull(imagestore.PullResult{Err: errors.New("no")})
	m.ObserveFallback()
	m.ObserveLoss("VMGone")
	m.Collect(Sources{
		Pods: func() []podvm.PodStatus {
			return []podvm.PodStatus{
				{State: podvm.Ready, Driver: "qemu", Guest: "g1", VMM: vmm.Info{PID: os.Getpid()}},
				{State: podvm.NotReady, Driver: "qemu", Guest: "g0", VMM: vmm.Info{PID: os.Getpid(), Err: vmm.ErrGone}},
			}
		},
		Containers: func() []podvm.ContainerStatus { return []podvm.ContainerStatus{{State: podvm.Running}} },
		Images:     func() (int, uint64, error) { return 3, 300, nil },
		Templates:  func() (int, int64) { return 1, 100 },
		Starting:   func() map[string]int { return map[string]int{"network": 3} },
		Warm:       func() int { return 2 },
	})
	return m
}

func TestScrape(t *testing.T) {
	text := scrape(t, filled())
	for _, want := range []string{
		`caisson_cri_request_duration_seconds_count{code="OK",method="RunPodSandbox"} 1`,
		`caisson_pod_start_phase_duration_seconds_sum{phase="cni",result="ok"} 1`,
		`caisson_pod_start_phase_duration_seconds_sum{phase="cni",result="error"} 2`,
		`caisson_pod_start_phase_duration_seconds_count{phase="guest",result="ok"} 1`,
		`caisson_pod_starts_total{origin="clone"} 1`,
		`caisson_pods_starting{phase="network"} 3`,
		`caisson_pods{driver="qemu",guest="g1",state="ready"} 1`,
		`caisson_pods{driver="qemu",guest="g0",state="ready"} 0`,
		`caisson_pods{driver="qemu",guest="g0",state="notready"} 1`,
		`caisson_containers{state="running"} 1`,
		`caisson_containers{state="exited"} 0`,
		`caisson_image_pull_duration_seconds_count{result="error"} 1`,
		`caisson_image_download_bytes_total 7`,
		`caisson_images 3`,
		`caisson_template_fallbacks_total 1`,
		`caisson_pod_losses_total{reason="VMGone"} 1`,
		`caisson_pod_losses_total{reason="Unreachable"} 0`,
		`caisson_build_info{acceleration="kvm",driver="qemu",guest="g1",version="v1"} 1`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	for _, f := range families {
		if !strings.Contains(text, "# TYPE "+f.name+" "+f.kind+"\n") {
			t.Errorf("%s is not a %s, or not there", f.name, f.kind)
		}
	}
	if problems, err := promlint.New(strings.NewReader(text)).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

func TestAllThatIsServedIsDeclared(t *testing.T) {
	for line := range strings.Lines(scrape(t, filled())) {
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[1] != "TYPE" || !strings.HasPrefix(fields[2], "caisson_") {
			continue
		}
		if !slices.ContainsFunc(families, func(f family) bool { return f.name == fields[2] }) {
			t.Errorf("%s is not in families", fields[2])
		}
	}
}

func TestUnreadableStoreIsAnError(t *testing.T) {
	m := New("v1", "qemu", "kvm", "g1")
	m.Collect(Sources{
		Pods: func() []podvm.PodStatus { return nil }, Containers: func() []podvm.ContainerStatus { return nil },
		Images: func() (int, uint64, error) { return 0, 0, errors.New("disk on fire") }, Templates: func() (int, int64) { return 0, 0 }, Warm: func() int { return 0 }, Starting: func() map[string]int { return nil },
	})
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 500 || !strings.Contains(w.Body.String(), "disk on fire") {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
}

func TestCPUNeverFalls(t *testing.T) {
	c := newCollector(Sources{})
	for i, tt := range []struct {
		now  map[int]usage
		want float64
	}{
		{map[int]usage{1: {"qemu", 5}, 2: {"qemu", 3}}, 8},
		{map[int]usage{1: {"qemu", 6}}, 9},
		{map[int]usage{1: {"qemu", 1}}, 10}, // another process with the number
		{nil, 10},
	} {
		if got := c.add(tt.now)["qemu"]; got != tt.want {
			t.Errorf("scrape %d: %v seconds, want %v", i, got, tt.want)
		}
	}
}

func TestDocument(t *testing.T) {
	const path = "../docs/METRICS.md"
	if *update {
		if err := os.WriteFile(path, []byte(Document()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(path)
	if err != nil || string(data) != Document() {
		t.Fatalf("docs/METRICS.md is not what the code says (%v): run 'go test ./metrics -update'", err)
	}
}
