package podvm

import (
	"cmp"
	"errors"
	"log/slog"
	"slices"

	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// rank has a node that is out of memory choose among pods as it would among their containers: what a pod has on
// the node is as expendable as the least expendable of its containers that have not ended. When all have, it stays
// what it was: others may follow, and a guest that says so must not gain by it.
func (p *Pod) rank() {
	p.ranking.Lock()
	defer p.ranking.Unlock()
	if !p.running() {
		return
	}
	all := p.limits("")
	if len(all) == 0 {
		return
	}
	least := slices.MinFunc(all, func(a, b Resources) int { return cmp.Compare(a.OOMScoreAdj, b.OOMScoreAdj) })
	run, score := p.m.layout.run(p.id), int(least.OOMScoreAdj)
	if err := errors.Join(process.SetOOMScore(run, score), p.m.o.Shares.SetOOMScore(run, score)); err != nil {
		slog.Warn("a node that is out of memory does not choose this pod by its class", "pod", p.id, "oom_score_adj", score, "err", err)
	}
}
