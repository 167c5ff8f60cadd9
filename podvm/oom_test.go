package podvm

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

// oomScore reads what a node that is out of memory goes by.
func oomScore(t *testing.T, pid string) int {
	t.Helper()
	text, err := os.ReadFile("/proc/" + pid + "/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return score
}

// TestOOMScore: the VMM is as expendable as the container that is to live longest, and goes before the daemon.
func TestOOMScore(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	pid := strconv.Itoa(n.driver.VMs()[0].Info().PID)
	least := oomScore(t, "self") + 1
	want := func(what string, score int) {
		t.Helper()
		score = max(score, least)
		if got := oomScore(t, pid); got != score {
			t.Errorf("%s: the VMM's is %d, want %d", what, got, score)
		}
	}
	if got := oomScore(t, pid); got != 0 {
		t.Errorf("without containers it is %d", got)
	}
	config := func(name string, score int64) ContainerConfig {
		c := containerConfig(name)
		c.Resources.OOMScoreAdj = score
		return c
	}
	n.running(p, config("effort", 1000))
	want("best effort", 1000)
	burst := n.container(p, config("burst", 700))
	want("beside one that bursts, and has not run yet", 700)
	guaranteed := n.running(p, config("guaranteed", -997))
	want("beside one that is guaranteed", -997)
	n.running(p, config("middle", 800))
	want("beside one in the middle", -997)
	a := n.agentOf(p.ID())
	a.exit(guaranteed.ID(), 0)
	<-guaranteed.exited
	want("after its end", 700)
	if err := burst.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
	want("after one was removed", 800)
	n.shares.mu.Lock()
	if got := n.shares.scores[n.layout.run(p.ID())]; got != 800 {
		t.Errorf("what serves its directories has %d", got)
	}
	n.shares.mu.Unlock()
	n.restart(func() {
		if err := os.WriteFile("/proc/"+pid+"/oom_score_adj", []byte("900"), 0); err != nil {
			t.Fatal(err)
		}
	})
	want("after a restart", 800)
	p = n.again(p.ID())
	for _, c := range p.Containers() {
		a.exit(c.ID(), 0)
		<-c.exited
	}
	if got := oomScore(t, pid); got < 800 {
		t.Errorf("when all have ended it is %d", got)
	}
	if err := p.Remove(soon(t)); err != nil {
		t.Fatal(err)
	}
}

// TestOOMScoreFails: a container is there all the same.
func TestOOMScoreFails(t *testing.T) {
	n := newNode(t)
	p := n.pod(podConfig("web"))
	n.shares.err = errInjected
	if s := n.running(p, containerConfig("main")).Status(); s.State != Running {
		t.Errorf("got %+v", s)
	}
}
