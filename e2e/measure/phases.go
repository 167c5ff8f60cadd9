package measure

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// phase is one of a pod's start, in ms since it began. Phases overlap.
type phase struct {
	Name  string  `json:"name"`
	Start float64 `json:"start_ms"`
	Took  float64 `json:"ms"`
}

// outside are the phases in which the runtime waits for others: for the VMM and the guest's boot,
// and for CNI plugins.
var outside = []string{"vm", "guest", "network"}

// phases keeps where the time of the pod's start went, where the runtime tells it, and what of it
// was the runtime's own.
func (p *pod) phases(ctx context.Context, count bool) error {
	if !count {
		return nil
	}
	status, err := p.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		return err
	}
	var info struct {
		Phases []phase `json:"phases"`
	}
	if text, ok := status.Info["info"]; ok {
		if err := json.Unmarshal([]byte(text), &info); err != nil {
			return fmt.Errorf("verbose status of pod %s: %w", p.id, err)
		}
	}
	if len(info.Phases) == 0 {
		return nil // another runtime
	}
	for _, ph := range info.Phases {
		if ph.Name != "total" {
			p.add("phase "+ph.Name, ph.Took/1000)
		}
	}
	p.add("own time", p.last("RunPodSandbox")-covered(info.Phases, outside)/1000)
	return nil
}

// covered is how long at least one phase of these names went on, in ms.
func covered(phases []phase, names []string) (sum float64) {
	phases = slices.DeleteFunc(slices.Clone(phases), func(p phase) bool { return !slices.Contains(names, p.Name) })
	slices.SortFunc(phases, func(a, b phase) int { return int(1000 * (a.Start - b.Start)) })
	end := 0.0
	for _, p := range phases {
		if to := p.Start + p.Took; to > end {
			sum += to - max(end, p.Start)
			end = to
		}
	}
	return sum
}
