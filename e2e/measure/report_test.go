package measure

import (
	"os/exec"
	"strings"
	"testing"
)

func TestQuantile(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		q      float64
		want   float64
	}{
		{[]float64{7}, 0.5, 7},
		{[]float64{3, 1, 2}, 0.5, 2},
		{[]float64{4, 1, 3, 2}, 0.5, 2},
		{[]float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 0.95, 10},
	} {
		if got := quantile(tt.values, tt.q); got != tt.want {
			t.Errorf("quantile(%v, %v) = %v, want %v", tt.values, tt.q, got, tt.want)
		}
	}
}

func TestReportComparesToTheFirst(t *testing.T) {
	one := &subject{Endpoint: Endpoint{Name: "one"}, Options: Options{Runs: 2}, samples: samples{"RunPodSandbox": {2, 2}, "pss": {10 << 20}}}
	two := &subject{Endpoint: Endpoint{Name: "two"}, samples: samples{"RunPodSandbox": {1, 1}, "pss": {40 << 20}}}
	text := newReport([]*subject{one, two}).String()
	for _, want := range []string{"2000 ms", "0.50x", "40.0 MiB", "4.00x"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

func TestReportComparesToAnother(t *testing.T) {
	var all []*subject
	for _, s := range []struct {
		name, against string
		took          float64
	}{{"runc", "", 1}, {"boot", "", 8}, {"clone", "boot", 2}} {
		all = append(all, &subject{Endpoint: Endpoint{Name: s.name, Against: s.against}, samples: samples{"RunPodSandbox": {s.took}}})
	}
	text := newReport(all).String()
	for _, want := range []string{"to boot", "8.00x", "2.00x", "0.25x"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

func TestLastToFirst(t *testing.T) {
	for _, tt := range []struct {
		starts []float64
		want   float64
	}{
		{[]float64{3}, 1},
		{[]float64{1, 2}, 2},
		{[]float64{1, 1, 9, 1, 1, 5, 2, 2, 2, 2, 2}, 2}, // one of each end scatters
	} {
		if got := lastToFirst(tt.starts); got != tt.want {
			t.Errorf("%v: got %v, want %v", tt.starts, got, tt.want)
		}
	}
}

func TestWeighFindsByCommandLine(t *testing.T) {
	id := strings.Repeat("5eed", 16)
	sleeper := exec.Command("sh", "-c", "read x", id)
	stdin, err := sleeper.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer sleeper.Wait()
	defer stdin.Close()
	w, err := Weigh(id)
	if err != nil || w.Processes < 1 || w.PSS <= 0 {
		t.Fatalf("weighed %+v, %v", w, err)
	}
}

func TestEndpoint(t *testing.T) {
	e, err := ParseEndpoint("kata=unix:///run/c.sock+kata")
	if err != nil || e.Name != "kata" || e.Address != "unix:///run/c.sock" || e.Handler != "kata" {
		t.Fatalf("got %+v, %v", e, err)
	}
	if _, err := ParseEndpoint("unix:///run/c.sock"); err == nil {
		t.Fatal("took an endpoint without a name")
	}
}

func TestCovered(t *testing.T) {
	phases := []phase{{"vm", 0, 10}, {"network", 5, 10}, {"disk", 15, 100}, {"guest", 20, 5}, {"guest", 21, 1}}
	if got := covered(phases, []string{"vm", "network", "guest"}); got != 20 {
		t.Errorf("got %v ms, want 20", got)
	}
}

func TestAlone(t *testing.T) {
	phases := []phase{{"total", 0, 100}, {"network", 0, 10}, {"vm", 4, 2}, {"guest", 9, 20}, {"network", 40, 5}}
	if got := alone(phases, "network"); got != 12 {
		t.Errorf("got %v ms, want 12", got)
	}
}
