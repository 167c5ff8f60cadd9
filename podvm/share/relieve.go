package share

import (
	"log/slog"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/share/passthrough"
)

// Guests forget what they do not use at most once in relieveLeast; one that does not get below the bound by
// that, because it uses so much or does as it likes, ever more seldom.
const relieveLeast, relieveMost = 100 * time.Millisecond, time.Minute

// relieve has the guest forget what it does not use of host directories when it knows so much that few
// descriptors are left. Its kernel would do so by itself only when it is short of memory.
func (s *sessions) relieve() error {
	scarce, err := passthrough.Scarce()
	if err != nil {
		return err
	}
	go relieve(scarce, passthrough.IsScarce, s.dropNames)
	return nil
}

func relieve(scarce <-chan struct{}, still func() bool, drop func()) {
	pause, told := relieveLeast, false
	for range scarce {
		if !still() { // it was until a moment ago
			continue
		}
		drop()
		time.Sleep(pause)
		if !still() {
			pause = relieveLeast
			continue
		}
		pause = min(2*pause, relieveMost)
		if pause == relieveMost && !told { // so it is not slow only
			told = true
			slog.Warn("the pod uses almost as many files of host directories at once as there may be: what it opens beyond fails (EMFILE); let it use fewer, or spread them over pods")
		}
	}
}

// dropNames tells the guest for each directory. One to which there is no stream opens nothing either.
func (s *sessions) dropNames() {
	for _, one := range s.all() {
		if one.link.Connected() {
			one.link.Send(agent.DropNames()) // it fails only when the process ends
		}
	}
}

func (s *sessions) all() (all []*session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, one := range s.byTag {
		all = append(all, one)
	}
	return all
}
