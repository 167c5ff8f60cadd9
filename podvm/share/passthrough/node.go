package passthrough

import (
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// identity is what makes an inode the same one: hard links have one identity. While it is open its
// number is no other inode's, but where the number is a server's, as with NFS and FUSE: there its
// kind and, if known, the time when it was made tell it from one that was before.
type identity struct {
	dev, ino, mount uint64
	kind            uint32 // of S_IFMT
	// born is 0 where the file system has no such time.
	bornSec  int64
	bornNsec uint32
}

func identify(st *unix.Statx_t) identity {
	i := identity{dev: device(st), ino: st.Ino, mount: st.Mnt_id, kind: uint32(st.Mode) & unix.S_IFMT}
	if st.Mask&unix.STATX_BTIME != 0 {
		i.bornSec, i.bornNsec = st.Btime.Sec, st.Btime.Nsec
	}
	return i
}

// node is an inode that the guest knows, by an O_PATH descriptor.
type node struct {
	descriptor
	id    uint64
	ident identity
	kind  uint32 // of S_IFMT
	locks owners
	// lookups are how often the guest was told of it. nodes.mu guards it, and crossed.
	lookups uint64
	// crossed says that there are crossings to it.
	crossed bool
}

func (n *node) put() {
	if n.release() {
		n.locks.closeAll()
	}
}

func (n *node) path() string { return procPath(n.fd) }

// nodes are all that the guest knows.
type nodes struct {
	b *budget

	mu   sync.Mutex
	last uint64 // ids are never used again
	byID map[uint64]*node
	all  map[identity]*node
	// crossings are the entries that are a mount's root.
	crossings map[Crossing]*node
}

func (s *nodes) init(b *budget, root int, st *unix.Statx_t) {
	s.b, s.last = b, fuse.FUSE_ROOT_ID
	n := &node{id: fuse.FUSE_ROOT_ID, ident: identify(st), kind: unix.S_IFDIR, lookups: 1}
	n.fd, n.b = root, b
	b.takeRoot()
	n.refs.Store(1)
	s.byID = map[uint64]*node{n.id: n}
	s.all = map[identity]*node{n.ident: n}
}

// add makes the inode known once more and returns its id. It takes fd, an O_PATH descriptor, over,
// also when it fails. by is not nil if it is another mount's than its directory.
func (s *nodes) add(fd int, st *unix.Statx_t, by *Crossing) (uint64, error) {
	id, taken, err := s.insert(fd, st, by)
	if !taken {
		unix.Close(fd) // which may free a removed file, so not under the lock
	}
	return id, err
}

// insert reports whether it took fd, which it does for an inode that is new.
func (s *nodes) insert(fd int, st *unix.Statx_t, by *Crossing) (id uint64, taken bool, err error) {
	ident := identify(st)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.all[ident]; n != nil {
		n.lookups++
		if by != nil && n.id != fuse.FUSE_ROOT_ID {
			s.crossed(*by, n)
		}
		return n.id, false, nil
	}
	if s.byID == nil { // closed
		return 0, false, unix.ESTALE
	}
	n := &node{ident: ident, kind: ident.kind, lookups: 1}
	if err := n.open(s.b, fd); err != nil {
		return 0, false, err
	}
	s.last++
	n.id = s.last
	s.byID[n.id], s.all[ident] = n, n
	if by != nil {
		s.crossed(*by, n)
	}
	return n.id, true, nil
}

// get returns a node that is there until its put.
func (s *nodes) get(id uint64) (*node, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.byID[id]
	if n == nil {
		return nil, unix.ESTALE
	}
	n.hold()
	return n, nil
}

// forget takes lookups back. The root is there until the end.
func (s *nodes) forget(id, lookups uint64) {
	s.mu.Lock()
	n := s.byID[id]
	if n == nil || id == fuse.FUSE_ROOT_ID {
		s.mu.Unlock()
		return
	}
	n.lookups -= min(lookups, n.lookups)
	gone := n.lookups == 0
	if gone {
		delete(s.byID, id)
		delete(s.all, n.ident)
		s.uncrossed(n)
	}
	s.mu.Unlock()
	if gone {
		n.put()
	}
}

func (s *nodes) closeAll() {
	s.mu.Lock()
	all := s.byID
	s.byID, s.all, s.crossings = nil, nil, nil
	s.mu.Unlock()
	for _, n := range all {
		n.put()
	}
}

// Forget takes nlookup of the times back that the guest was told of the node.
func (f *FS) Forget(nodeID, nlookup uint64) { f.nodes.forget(nodeID, nlookup) }
