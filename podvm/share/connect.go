package share

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// connect joins the guest to the process, which has the directory. The caller has the turn.
func (p *served) connect(ctx context.Context, d Dir) error {
	conn, err := p.Guest.Dial(ctx, vmm.AgentPort)
	if err != nil {
		return fmt.Errorf("dial the agent: %w", err)
	}
	stream, relayed, err := p.handOver(conn)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	_, err = p.ask(ctx, request{
		Tag: d.Tag, ReadOnly: d.ReadOnly && d.Recursive, Forget: d.Follow && !d.Keep, Relayed: relayed != nil,
	}, stream)
	if err == nil && relayed != nil {
		p.relays[d.Tag] = relayed
	}
	if err != nil && relayed != nil {
		relayed.stop()
	}
	return errors.Join(err, stream.Close())
}

// handOver returns a descriptor by which another process has the stream. Where the stream is not of the
// kernel's but of the daemon's, it is the end of a pair, whose other end is relayed to it.
func (p *served) handOver(conn net.Conn) (stream *os.File, r *relay, err error) {
	if c, ok := conn.(*net.UnixConn); ok {
		stream, err := c.File()
		if err != nil {
			return nil, nil, err
		}
		return stream, nil, c.Close()
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "relay"), os.NewFile(uintptr(pair[1]), "stream")
	defer ours.Close()
	end, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	r = &relay{guest: conn, process: end, ended: make(chan struct{})}
	go p.relay(r)
	return theirs, r, nil
}

// relay is a stream that goes through this daemon.
type relay struct {
	guest, process net.Conn
	ended          chan struct{}
}

func (r *relay) runs() bool {
	if r == nil {
		return false
	}
	select {
	case <-r.ended:
		return false
	default:
		return true
	}
}

func (r *relay) stop() {
	r.guest.Close()
	r.process.Close()
}

// relay passes bytes both ways until either end is gone, or the pod ends.
func (p *served) relay(r *relay) {
	stop := context.AfterFunc(p.life, r.stop)
	defer stop()
	var both sync.WaitGroup
	pass := func(dst, src net.Conn) {
		io.Copy(dst, src) // its error is that of an end that is gone
		r.stop()
	}
	both.Go(func() { pass(r.guest, r.process) })
	both.Go(func() { pass(r.process, r.guest) })
	both.Wait()
	close(r.ended)
	p.look()
}
