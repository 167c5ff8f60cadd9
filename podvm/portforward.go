package podvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// PortForward connects the stream to a TCP port on the pod's loopback, until both sides have ended, or the
// client has and the pod says nothing for silenceLimit.
// Errors: errdefs.ErrFailedPrecondition when nobody listens there.
func (p *Pod) PortForward(ctx context.Context, port uint16, stream io.ReadWriteCloser) error {
	if !p.running() {
		return p.notReady()
	}
	conn, err := p.client.PortForward(ctx, port)
	if err != nil {
		return fmt.Errorf("port %d of pod %s: %w", port, p.id, err)
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	return relay(conn, stream)
}

// relay copies both ways; the end of one direction is passed on, and the other goes on.
func relay(conn net.Conn, stream io.ReadWriteCloser) error {
	defer conn.Close()
	pod := newAnswers(conn)
	up := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, stream)
		pod.last()
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			err = errors.Join(err, half.CloseWrite())
		}
		up <- err
	}()
	_, err := io.Copy(stream, pod)
	stream.Close() // all that the pod had to say was said: the client's next word would reach nobody
	conn.Close()   // nor does what it has said already, where the pod does not read
	<-up
	if pod.silent() {
		return nil // an error would have kubectl end the client's other connections, too
	}
	return err
}

// silenceLimit is how long a pod may say nothing to a client that has ended: such a one may wait for an answer, or
// be gone, which is not told of one of several that share a connection.
const silenceLimit = 30 * time.Second

// answers is what a pod says on a connection.
type answers struct {
	net.Conn

	mu      sync.Mutex
	awaited bool        // a Read waits
	late    bool        // the client has ended
	limit   *time.Timer // runs when both are so
	over    bool        // the limit was reached
}

func newAnswers(conn net.Conn) *answers {
	a := &answers{Conn: conn}
	a.limit = time.AfterFunc(silenceLimit, a.end)
	a.limit.Stop()
	return a
}

// Read implements net.Conn.
func (a *answers) Read(b []byte) (int, error) {
	a.set(&a.awaited, true)
	defer a.set(&a.awaited, false)
	return a.Conn.Read(b)
}

// last tells that the client has ended.
func (a *answers) last() { a.set(&a.late, true) }

func (a *answers) set(what *bool, value bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	*what = value
	if a.awaited && a.late {
		a.limit.Reset(silenceLimit)
	} else {
		a.limit.Stop()
	}
}

func (a *answers) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over = a.awaited; a.over {
		a.Close()
	}
}

// silent tells whether the pod has said nothing for too long.
func (a *answers) silent() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.over
}
