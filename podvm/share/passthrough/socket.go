package passthrough

import (
	"log/slog"
	"sync"
	"sync/atomic"
)

// sockets tell why connect(2) refuses: who listens on a socket of the host's is in another kernel than
// who connects.
type sockets struct {
	// made says that the guest has made some itself, which works.
	made atomic.Bool
	told sync.Once
}

// looked logs the first that the guest looks up, unless it may be its own.
func (s *sockets) looked(name string) {
	if s.made.Load() {
		return
	}
	s.told.Do(func() {
		slog.Warn("a pod looks up a socket of the node in a host directory, and can't connect to who listens there; have that listen on an address of the network, or run it in the pod", "name", name)
	})
}
