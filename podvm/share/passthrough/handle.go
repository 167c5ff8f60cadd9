package passthrough

import (
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// What a handle has to be of.
const (
	anyKind   = 0
	regular   = unix.S_IFREG
	directory = unix.S_IFDIR
)

// handle is an open file or directory of the guest.
type handle struct {
	descriptor
	kind  uint32
	flags int
	dir   *dirStream // nil for a file
	// unsized says that the size says nothing of the content.
	unsized bool
}

// openFlags are the protocol's. Without a cache the guest's kernel asks whatever the size is.
func (h *handle) openFlags() uint32 {
	if h.unsized {
		return fuse.FOPEN_DIRECT_IO
	}
	return 0
}

func (h *handle) put() {
	if h.release() && h.dir != nil {
		h.dir.drop()
	}
}

// handles are all that the guest has open.
type handles struct {
	b *budget

	mu   sync.Mutex
	last uint64
	all  map[uint64]*handle
}

func (s *handles) init(b *budget) { s.b, s.all = b, make(map[uint64]*handle) }

// add takes fd over, also when it fails.
func (s *handles) add(h *handle, fd int) (uint64, error) {
	if err := h.open(s.b, fd); err != nil {
		unix.Close(fd)
		return 0, err
	}
	id, ok := s.insert(h)
	if !ok {
		h.release()
		return 0, unix.ESTALE
	}
	return id, nil
}

func (s *handles) insert(h *handle) (uint64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == nil { // closed
		return 0, false
	}
	s.last++
	s.all[s.last] = h
	return s.last, true
}

// get returns a handle that is open until its put.
func (s *handles) get(id uint64, kind uint32) (*handle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.all[id]
	if h == nil || kind != anyKind && h.kind != kind {
		return nil, unix.EBADF
	}
	h.hold()
	return h, nil
}

func (s *handles) remove(id uint64) {
	s.mu.Lock()
	h := s.all[id]
	delete(s.all, id)
	s.mu.Unlock()
	if h != nil {
		h.put()
	}
}

func (s *handles) closeAll() {
	s.mu.Lock()
	all := s.all
	s.all = nil
	s.mu.Unlock()
	for _, h := range all {
		h.put()
	}
}
