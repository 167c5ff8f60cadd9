package share

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// connect joins the guest to the process, which has the directory. The caller has the turn.
func (p *served) connect(ctx context.Context, d Dir) error {
	conn, err := p.Guest.Dial(ctx, vmm.AgentPort)
	if err != nil {
		return fmt.Errorf("dial the agent: %w", err)
	}
	stream, relayed, err := handOver(conn)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	joined := make(chan bool, 1)
	if relayed != nil {
		p.relays[d.Tag] = true
		go p.relay(conn, relayed, d, joined)
	}
	_, err = p.ask(ctx, request{Tag: d.Tag, ReadOnly: d.ReadOnly && d.Recursive, Relayed: relayed != nil}, stream)
	joined <- err == nil
	return errors.Join(err, stream.Close())
}

// handOver returns a descriptor by which another process has the stream. Where the stream is not of the
// kernel's but of the daemon's, it is the end of a pair, whose other end is to be relayed to it.
func handOver(conn net.Conn) (stream *os.File, relayed net.Conn, err error) {
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
	relayed, err = net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return theirs, relayed, nil
}

// relay passes bytes both ways until either end is gone, and joins guest and process anew, if they were,
// unless the pod ends.
func (p *served) relay(guest, process net.Conn, d Dir, joined <-chan bool) {
	stop := context.AfterFunc(p.life, func() { guest.Close(); process.Close() })
	var both sync.WaitGroup
	pass := func(dst, src net.Conn) {
		io.Copy(dst, src)
		dst.Close()
		src.Close()
	}
	both.Go(func() { pass(guest, process) })
	both.Go(func() { pass(process, guest) })
	both.Wait()
	stop()
	again := <-joined
	p.turn <- struct{}{}
	delete(p.relays, d.Tag)
	<-p.turn
	if !again || !p.pause(pauseMin) {
		return
	}
	err := p.share(p.life, d)
	if err != nil && p.life.Err() == nil && !errors.Is(err, vmm.ErrGone) && !errdefs.IsUnavailable(err) {
		slog.Warn("join a guest to a host directory again", "pod", p.ID, "path", d.Path, "err", err)
	}
}
