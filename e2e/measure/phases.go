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

// inGuest are those in which the agent in the guest does its part.
var inGuest = []string{"setup", "addresses"}

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
	phases, err := p.keep("phase ", status.Info)
	if err != nil || len(phases) == 0 {
		return err
	}
	p.add("own time", p.last("RunPodSandbox")-covered(phases, outside)/1000)
	p.add("own time on the node", p.last("RunPodSandbox")-covered(phases, slices.Concat(outside, inGuest))/1000)
	p.add("RunPodSandbox less CNI", p.last("RunPodSandbox")-alone(phases, "network")/1000)
	return nil
}

// containerPhases keeps where the time of the container's creation went.
func (p *pod) containerPhases(ctx context.Context, count bool) error {
	if !count {
		return nil
	}
	status, err := p.runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: p.container, Verbose: true})
	if err != nil {
		return err
	}
	_, err = p.keep("create phase ", status.Info)
	return err
}

// idlePhases keeps where the time of the start went of the i-th of n pods, if that is one of the first or of the
// last ones: what makes the last ones slower is to be seen there.
func (p *pod) idlePhases(ctx context.Context, i, n int) error {
	var prefix string
	switch {
	case i < ends(n):
		prefix = "idle, first: phase "
	case i >= n-ends(n):
		prefix = "idle, last: phase "
	default:
		return nil
	}
	status, err := p.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		return err
	}
	_, err = p.keep(prefix, status.Info)
	return err
}

// keep adds the phases of a verbose status, of which other runtimes have none.
func (p *pod) keep(prefix string, verbose map[string]string) ([]phase, error) {
	var info struct {
		Phases []phase `json:"phases"`
	}
	if text, ok := verbose["info"]; ok {
		if err := json.Unmarshal([]byte(text), &info); err != nil {
			return nil, fmt.Errorf("verbose status in pod %s: %w", p.id, err)
		}
	}
	for _, ph := range info.Phases {
		if ph.Name != "total" {
			p.add(prefix+ph.Name, ph.Took/1000)
		}
	}
	return info.Phases, nil
}

// alone is how long nothing but the phase of this name went on, in ms.
func alone(phases []phase, name string) float64 {
	var all, others []string
	for _, p := range phases {
		if p.Name == "total" {
			continue
		}
		all = append(all, p.Name)
		if p.Name != name {
			others = append(others, p.Name)
		}
	}
	return covered(phases, all) - covered(phases, others)
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
