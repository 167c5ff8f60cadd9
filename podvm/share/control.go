package share

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// request is what the daemon asks a process, one a connection. With a descriptor it is a new stream of the
// guest's agent; without, it asks whether the directory is known.
type request struct {
	Tag string
	// ReadOnly refuses all that writes, in whatever is mounted there.
	ReadOnly bool
	// Forget has the guest forget other file systems below.
	Forget bool
	// Relayed streams end with the daemon.
	Relayed bool
}

// response is the answer.
type response struct {
	// Placed directories are where the process finds them. Connected: they have a stream, of the guest's own.
	Placed, Connected bool
	// Reply has the error, if there is one.
	agent.Reply
}

// controlMax bounds a request and a response, in bytes.
const controlMax = 8 << 10

// ask asks the process.
func (p *served) ask(ctx context.Context, q request, stream *os.File) (response, error) {
	var r response
	conn, err := dial(ctx, socketPath(folder(p.Dir)))
	if err == nil {
		defer conn.Close()
		defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
		if err = send(conn, q, stream); err == nil {
			r, err = receive(conn)
		}
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return r, fmt.Errorf("ask the process that serves host directories: %w: %w", err, errdefs.ErrUnavailable)
	}
	return r, r.Err()
}

func dial(ctx context.Context, path string) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

func send(conn *net.UnixConn, q request, stream *os.File) error {
	data, err := json.Marshal(q)
	if err != nil {
		return err
	}
	var rights []byte
	if stream != nil {
		rights = unix.UnixRights(int(stream.Fd()))
	}
	if _, _, err := conn.WriteMsgUnix(data, rights, nil); err != nil {
		return err
	}
	return conn.CloseWrite()
}

func receive(conn *net.UnixConn) (r response, err error) {
	err = agent.ReadMessage(conn, &r)
	return r, err
}

// accept reads a request, and its descriptor, if there is one.
func accept(conn *net.UnixConn) (q request, stream *os.File, err error) {
	data, rights := make([]byte, controlMax), make([]byte, unix.CmsgSpace(4))
	n, rn, _, _, err := conn.ReadMsgUnix(data, rights)
	if err != nil {
		return q, nil, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:rn])
	if err != nil {
		return q, nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return q, nil, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			stream = os.NewFile(uintptr(fd), "stream")
		}
	}
	if err := json.Unmarshal(data[:n], &q); err != nil {
		if stream != nil {
			err = errors.Join(err, stream.Close())
		}
		return q, nil, err
	}
	return q, stream, nil
}
