package main

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// report is what one run found.
type report struct {
	Machine  string    `json:"machine"`
	Runs     int       `json:"runs"`
	Runtimes []figures `json:"runtimes"`
}

type figures struct {
	Name    string            `json:"name"`
	Version string            `json:"version"`
	Figures map[string]figure `json:"figures"`
}

// figure is seconds, bytes or a number, as its name says.
type figure struct {
	P50 float64 `json:"p50"`
	P95 float64 `json:"p95"`
	N   int     `json:"n"`
	// Ratio is P50 over that of the first runtime of the run.
	Ratio float64 `json:"ratio"`
}

// rows is the order of the table.
var rows = []string{
	"RunPodSandbox", "CreateContainer", "StartContainer", "ExecSync", "Stop+Remove", "pss", "processes",
	"idle: start", "idle: first", "idle: last", "idle: pss per pod", "idle: memory taken per pod",
}

func newReport(all []*subject) report {
	r := report{Machine: machine(), Runs: all[0].runs}
	for i, s := range all {
		if starts := s.samples["idle: start"]; len(starts) > 0 {
			s.samples["idle: first"], s.samples["idle: last"] = starts[:1], starts[len(starts)-1:]
		}
		f := figures{s.name, s.version, map[string]figure{}}
		for name, values := range s.samples {
			fig := figure{P50: quantile(values, 0.5), P95: quantile(values, 0.95), N: len(values), Ratio: 1}
			if i > 0 {
				fig.Ratio = fig.P50 / r.Runtimes[0].Figures[name].P50
			}
			f.Figures[name] = fig
		}
		r.Runtimes = append(r.Runtimes, f)
	}
	return r
}

// quantile is the smallest value that at least a share q of all does not exceed.
func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[max(0, int(math.Ceil(q*float64(len(sorted))))-1)]
}

func (r report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s; %d pods each, alternating\n", r.Machine, r.Runs)
	for _, f := range r.Runtimes {
		fmt.Fprintf(&b, "%s: %s\n", f.Name, f.Version)
	}
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "\n\t")
	for i, f := range r.Runtimes {
		fmt.Fprintf(w, "%s p50\tp95\t", f.Name)
		if i > 0 {
			fmt.Fprintf(w, "to %s\t", r.Runtimes[0].Name)
		}
	}
	fmt.Fprintln(w)
	for _, name := range rows {
		if _, ok := r.Runtimes[0].Figures[name]; !ok {
			continue
		}
		fmt.Fprintf(w, "%s\t", name)
		for i, f := range r.Runtimes {
			fig := f.Figures[name]
			fmt.Fprintf(w, "%s\t%s\t", show(name, fig.P50), show(name, fig.P95))
			if i > 0 {
				fmt.Fprintf(w, "%.2fx\t", fig.Ratio)
			}
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	return b.String()
}

func show(name string, v float64) string {
	switch {
	case strings.Contains(name, "pss"), strings.Contains(name, "memory"):
		return fmt.Sprintf("%.1f MiB", v/(1<<20))
	case name == "processes":
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.0f ms", v*1000)
}

// machine names what the figures were measured on.
func machine() string {
	model := "unknown CPU"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, rest, ok := strings.Cut(string(info), "model name"); ok {
			line, _, _ := strings.Cut(rest, "\n")
			model = strings.TrimLeft(line, "\t :")
		}
	}
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return fmt.Sprintf("%d x %s, Linux %s", runtime.NumCPU(), model, strings.TrimSpace(string(release)))
}
