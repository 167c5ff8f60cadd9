package server

import (
	"context"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// clients are those of the streams' server, by address, each with a channel that is closed when it has gone.
// The library passes a context that ends with the client to exec and attach, and none to port-forward.
type clients struct{ gone sync.Map }

// connKey is where a request's context has its connection.
type connKey struct{}

// withConn is http.Server's ConnContext.
func withConn(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}

// serve has requests end with their clients' connections.
func (c *clients) serve(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		c.gone.Store(r.RemoteAddr, ctx.Done())
		defer c.gone.CompareAndDelete(r.RemoteAddr, ctx.Done())
		if conn, ok := ctx.Value(connKey{}).(syscall.Conn); ok {
			go watch(ctx, conn, cancel)
		}
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// of returns the channel of the client that has opened a stream; nil where the stream does not know its client,
// as with WebSocket.
func (c *clients) of(stream any) <-chan struct{} {
	s, ok := stream.(interface{ RemoteAddr() net.Addr })
	if !ok {
		return nil
	}
	if gone, ok := c.gone.Load(s.RemoteAddr().String()); ok {
		return gone.(<-chan struct{})
	}
	gone := make(chan struct{})
	close(gone)
	return gone
}

// lookEvery is how often it is looked whether a client is there.
const lookEvery = time.Second

// watch tells when a client has ended its connection. Who reads from it sees that too, but not before all was read
// that the client has said, which waits where the pod does not take it.
func watch(ctx context.Context, conn syscall.Conn, gone func()) {
	raw, err := conn.SyscallConn()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for err == nil && !hungUp(raw) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
	gone()
}

// hungUp tells whether the other end has ended a connection, or this one has.
func hungUp(conn syscall.RawConn) bool {
	ended := false
	err := conn.Control(func(fd uintptr) {
		n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}, 0) // it waits for nothing
		ended = n > 0
	})
	return ended || err != nil
}
