package measure

import (
	"fmt"
	"maps"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// Report is what one run found.
type Report struct {
	Machine  string    `json:"machine"`
	Runs     int       `json:"runs"`
	Runtimes []Figures `json:"runtimes"`
}

// Figures are those of one runtime, by name.
type Figures struct {
	Name string `json:"name"`
	// Against is the runtime of RatioAgainst, if any.
	Against string            `json:"against,omitempty"`
	Version string            `json:"version"`
	Figures map[string]Figure `json:"figures"`
	// Losses say of pods that were lost why they were.
	Losses []string `json:"losses,omitempty"`
}

// Figure is seconds, bytes or a number, as its name says.
type Figure struct {
	P50 float64 `json:"p50"`
	P95 float64 `json:"p95"`
	N   int     `json:"n"`
	// Ratio is P50 over that of the first runtime of the run; 0 where that has none.
	Ratio float64 `json:"ratio"`
	// RatioAgainst is P50 over that of the runtime that the endpoint names.
	RatioAgainst float64 `json:"ratio_against,omitempty"`
}

// rows is the order of the table; phases come after these.
var rows = []string{
	"boot alone", "RunPodSandbox", "RunPodSandbox less CNI", "CreateContainer", "StartContainer", "Create+Start", "pod running",
	"ExecSync", "Stop+Remove", "pss", "processes",
	"idle: start", "idle: last to first", "idle: pss per pod", "idle: largest pss", "idle: pss with a container", "idle: memory taken per pod", "idle: pods lost", "own time", "own time on the node",
}

// named are the rows that any of the runtimes has figures for.
func (r Report) named() []string {
	have := map[string]bool{}
	for _, f := range r.Runtimes {
		for name := range f.Figures {
			have[name] = true
		}
	}
	all := slices.DeleteFunc(slices.Clone(rows), func(name string) bool { return !have[name] })
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if strings.Contains(name, "phase ") {
			all = append(all, name)
		}
	}
	return all
}

func newReport(all []*subject) Report {
	r := Report{Machine: machine(), Runs: all[0].Runs}
	for _, s := range all {
		if starts := s.samples["idle: start"]; len(starts) > 0 {
			s.samples["idle: last to first"] = []float64{lastToFirst(starts)}
		}
		f := Figures{s.Name, s.Against, s.version, map[string]Figure{}, s.losses}
		for name, values := range s.samples {
			f.Figures[name] = Figure{P50: quantile(values, 0.5), P95: quantile(values, 0.95), N: len(values)}
		}
		r.Runtimes = append(r.Runtimes, f)
	}
	for i, f := range r.Runtimes {
		for name, fig := range f.Figures {
			fig.Ratio = r.ratio(fig, r.Runtimes[0].Name, name)
			if i > 0 && f.Against != r.Runtimes[0].Name {
				fig.RatioAgainst = r.ratio(fig, f.Against, name)
			}
			f.Figures[name] = fig
		}
	}
	return r
}

// ratio of a figure to another runtime's of that name; 0 where there is none.
func (r Report) ratio(fig Figure, runtime, name string) float64 {
	for _, f := range r.Runtimes {
		if to, ok := f.Figures[name]; ok && f.Name == runtime && to.P50 > 0 {
			return fig.P50 / to.P50
		}
	}
	return 0
}

// lastToFirst compares how long the last of many pods took to start with the first. Single starts
// scatter, so that it is the medians of up to five at each end.
func lastToFirst(starts []float64) float64 {
	n := ends(len(starts))
	return quantile(starts[len(starts)-n:], 0.5) / quantile(starts[:n], 0.5)
}

// ends is how many of n pods are the first ones, and how many the last ones.
func ends(n int) int { return min(5, (n+1)/2) }

// quantile is the smallest value that at least a share q of all does not exceed.
func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[max(0, int(math.Ceil(q*float64(len(sorted))))-1)]
}

// String is a table.
func (r Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s; %d pods each, alternating\n", r.Machine, r.Runs)
	for _, f := range r.Runtimes {
		fmt.Fprintf(&b, "%s: %s\n", f.Name, f.Version)
	}
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "\n\t")
	for i, f := range r.Runtimes {
		fmt.Fprintf(w, "%s p50\tp95\t", f.Name)
		for _, to := range r.compared(i) {
			fmt.Fprintf(w, "to %s\t", to)
		}
	}
	fmt.Fprintln(w)
	for _, name := range r.named() {
		fmt.Fprintf(w, "%s\t", name)
		for i, f := range r.Runtimes {
			fig, ok := f.Figures[name]
			if !ok {
				fmt.Fprint(w, "\t\t")
			} else {
				fmt.Fprintf(w, "%s\t%s\t", show(name, fig.P50), show(name, fig.P95))
			}
			for n := range r.compared(i) {
				if ratio := []float64{fig.Ratio, fig.RatioAgainst}[n]; ratio > 0 {
					fmt.Fprintf(w, "%.2fx\t", ratio)
				} else {
					fmt.Fprint(w, "\t")
				}
			}
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	for _, f := range r.Runtimes {
		for _, loss := range f.Losses {
			fmt.Fprintf(&b, "%s: lost: %s\n", f.Name, loss)
		}
	}
	return b.String()
}

// compared are the runtimes to which the i-th has ratios.
func (r Report) compared(i int) (names []string) {
	if i == 0 {
		return nil
	}
	names = append(names, r.Runtimes[0].Name)
	to := r.Runtimes[i].Against
	if to != names[0] && slices.ContainsFunc(r.Runtimes, func(f Figures) bool { return f.Name == to }) {
		names = append(names, to)
	}
	return names
}

func show(name string, v float64) string {
	switch {
	case strings.Contains(name, "pss"), strings.Contains(name, "memory"):
		return fmt.Sprintf("%.1f MiB", v/(1<<20))
	case name == "processes", name == "idle: pods lost":
		return fmt.Sprintf("%.0f", v)
	case name == "idle: last to first":
		return fmt.Sprintf("%.2f", v)
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
