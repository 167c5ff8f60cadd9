package share

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/share/passthrough"
)

const (
	// requestsMax bounds the requests of a directory that are worked on at once.
	requestsMax = 256
	// waitersMax bounds those that wait for a lock, which whoever has it needs a request to give back.
	waitersMax = 1 << 10
)

// session is a directory that is served. Its link outlives the daemon's connections.
type session struct {
	// id tells this session from those of other processes, which know nothing of what was opened in it.
	id       uint64
	link     *agent.Link
	relayed  atomic.Bool // the stream in use
	fs       *passthrough.FS
	server   *fuse.ProtocolServer
	readOnly bool
	told     sync.Once // of what its guest does wrong
	requests chan struct{}
	waiters  chan struct{}
}

func newSession(root *os.File, readOnly bool) (*session, error) {
	fs, err := passthrough.New(root)
	if err != nil {
		return nil, err
	}
	var id [8]byte
	rand.Read(id[:])
	return &session{
		id: binary.LittleEndian.Uint64(id[:]), link: agent.NewLink(), fs: fs, server: fuse.NewProtocolServer(fs, fs.Options()), readOnly: readOnly,
		requests: make(chan struct{}, requestsMax), waiters: make(chan struct{}, waitersMax),
	}, nil
}

// deliver begins to work on a request.
func (s *session) deliver(ctx context.Context, message []byte) error {
	r, err := parse(message)
	if err != nil {
		return err
	}
	room := s.requests
	if r.opcode == opSetlkw {
		room = s.waiters
	}
	select {
	case room <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	go func() {
		defer func() { <-room }()
		if reply := s.answer(r); len(reply) > 0 {
			s.link.Send(reply) // it fails only when the process ends
		}
	}()
	return nil
}

// answer does what is asked for and returns the reply, which is empty for what has none.
func (s *session) answer(r fuseRequest) []byte {
	if s.readOnly && r.writes() {
		return r.fail(unix.EROFS)
	}
	reply := make([]byte, r.replyMax())
	n, status := s.server.HandleRequest([][]byte{r.message}, [][]byte{reply})
	if !status.Ok() {
		return r.fail(unix.Errno(status))
	}
	if n < len(reply)/2 { // it is kept until the guest acknowledges it
		return append([]byte(nil), reply[:n]...)
	}
	return reply[:n]
}

// fuseRequest is a request of the FUSE protocol, see linux/fuse.h.
type fuseRequest struct {
	message []byte
	opcode  uint32
}

// Sizes of structs in linux/fuse.h, and what a reply without data takes at most.
const (
	inHeader, outHeader = 40, 16
	lkIn                = 48
	replyRest           = 4 << 10
)

func parse(message []byte) (fuseRequest, error) {
	if len(message) < inHeader || binary.LittleEndian.Uint32(message) != uint32(len(message)) {
		return fuseRequest{}, fmt.Errorf("malformed FUSE request of %d bytes: %w", len(message), errdefs.ErrInvalidArgument)
	}
	r := fuseRequest{message, binary.LittleEndian.Uint32(message[4:])}
	if r.opcode == opSetlkw && len(message) != inHeader+lkIn { // which is kept for as long as it waits
		return fuseRequest{}, fmt.Errorf("malformed FUSE request of %d bytes for a lock: %w", len(message), errdefs.ErrInvalidArgument)
	}
	return r, nil
}

// fail returns a reply that says no more than an error.
func (r fuseRequest) fail(e unix.Errno) []byte {
	reply := make([]byte, outHeader)
	binary.LittleEndian.PutUint32(reply, outHeader)
	binary.LittleEndian.PutUint32(reply[4:], -uint32(e))
	copy(reply[8:], r.message[8:16]) // which request it is for
	return reply
}

// replyMax bounds the reply, in bytes, by what the request asks for.
func (r fuseRequest) replyMax() int {
	size := 0
	switch r.opcode {
	case opSetlkw: // it may be long until there is one
		return outHeader
	case opRead, opReaddir, opReaddirplus: // fuse_read_in: fh, offset, size
		size = int(r.uint32(inHeader + 16))
	case opGetxattr, opListxattr: // fuse_getxattr_in: size
		size = int(r.uint32(inHeader))
	case opReadlink:
		size = unix.PathMax
	}
	return outHeader + min(size, passthrough.MaxWrite) + replyRest
}

// uint32 reads a field of the request; 0 where there is none.
func (r fuseRequest) uint32(at int) uint32 {
	if len(r.message) < at+4 {
		return 0
	}
	return binary.LittleEndian.Uint32(r.message[at:])
}
