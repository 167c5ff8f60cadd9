package passthrough

import (
	"cmp"
	"maps"
	"slices"
)

// maxCrossings bounds the crossings that are kept. Those beyond it stay as long as the guest likes.
const maxCrossings = 4096

// Crossing is an entry by which the guest knows the root of another mount than its directory's.
type Crossing struct {
	Parent uint64 // the directory's node
	Name   string
}

// place is where an entry is looked up.
type place struct {
	fd    int
	node  uint64
	mount uint64
}

func (n *node) place() place { return place{n.fd, n.id, n.ident.mount} }

// Crossings are those that the guest knows. As long as it knows anything of a file system that is
// mounted below the directory, the host can't unmount that: EBUSY. The guest forgets what nobody has
// open when it is told by FUSE_NOTIFY_INVAL_ENTRY that the entry is out of date. That also ends the
// guest's own mounts on and below the entry. And what was open then and is closed within the time for
// which names are valid stays, since the entry has no name any more, until it is looked up again.
func (f *FS) Crossings() []Crossing {
	f.nodes.mu.Lock()
	all := slices.Collect(maps.Keys(f.nodes.crossings))
	f.nodes.mu.Unlock()
	slices.SortFunc(all, func(a, b Crossing) int {
		return cmp.Or(cmp.Compare(a.Parent, b.Parent), cmp.Compare(a.Name, b.Name))
	})
	return all
}

// crossed remembers by which entry a mount's root is known, of which there may be several.
// Precondition: mu is held.
func (s *nodes) crossed(c Crossing, n *node) {
	if _, known := s.crossings[c]; !known && len(s.crossings) >= maxCrossings {
		return
	}
	if s.crossings == nil {
		s.crossings = make(map[Crossing]*node)
	}
	s.crossings[c] = n
	n.crossed = true
}

// uncrossed forgets by which entries a mount's root is known.
// Precondition: mu is held.
func (s *nodes) uncrossed(n *node) {
	if n.crossed {
		maps.DeleteFunc(s.crossings, func(_ Crossing, of *node) bool { return of == n })
	}
}
