package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// qmp speaks QEMU's control protocol: JSON objects, a line each, over a unix socket.
// Source: docs/interop/qmp-spec.txt of QEMU.
type qmp struct {
	conn *net.UnixConn
	// event is called for each event, in order, by the one reader. It must not call execute.
	event func(name string, data json.RawMessage)

	sending sync.Mutex // one command at a time on the wire; held for the write alone

	mu      sync.Mutex
	next    int
	waiting map[int]chan reply // closed when the connection ends
	err     error
}

type reply struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// messageMax bounds one message from QEMU, in bytes. A guest that took QEMU over must not fill the
// daemon's memory.
const messageMax = 1 << 20

// dialQMP connects and leaves the negotiation mode.
func dialQMP(ctx context.Context, socket string, event func(string, json.RawMessage)) (*qmp, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("qmp: %w", err)
	}
	q := &qmp{conn: conn.(*net.UnixConn), event: event, waiting: map[int]chan reply{}}
	go q.read()
	if err := q.execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		q.close()
		return nil, err
	}
	return q, nil
}

func (q *qmp) close() error { return q.conn.Close() }

// read handles all that QEMU says, until the connection ends.
func (q *qmp) read() {
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(make([]byte, 4<<10), messageMax)
	for lines.Scan() {
		var m struct {
			reply
			ID    *int            `json:"id"`
			Event string          `json:"event"`
			Data  json.RawMessage `json:"data"`
		}
		if json.Unmarshal(lines.Bytes(), &m) != nil {
			break
		}
		switch {
		case m.Event != "":
			q.event(m.Event, m.Data)
		case m.ID != nil:
			q.deliver(*m.ID, m.reply)
		}
	}
	q.conn.Close()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.err = fmt.Errorf("connection closed: %w", io.EOF)
	if err := lines.Err(); err != nil {
		q.err = err
	}
	for id, c := range q.waiting {
		close(c)
		delete(q.waiting, id)
	}
}

func (q *qmp) deliver(id int, r reply) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if c, ok := q.waiting[id]; ok {
		c <- r // it has room for one
		delete(q.waiting, id)
	}
}

// execute runs a command and decodes what it returns. arguments and result may be nil.
func (q *qmp) execute(ctx context.Context, command string, arguments, result any) error {
	return q.executeWith(ctx, command, arguments, result, nil)
}

// executeWith sends a descriptor along with the command.
func (q *qmp) executeWith(ctx context.Context, command string, arguments, result any, f *os.File) error {
	id, answer, err := q.register()
	if err == nil {
		err = q.send(id, command, arguments, f)
	}
	if err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	select {
	case r, ok := <-answer:
		if !ok {
			return fmt.Errorf("qmp %s: connection closed: %w", command, io.EOF)
		}
		return finish(command, r, result)
	case <-ctx.Done():
		q.mu.Lock()
		delete(q.waiting, id)
		q.mu.Unlock()
		return fmt.Errorf("qmp %s: %w", command, context.Cause(ctx))
	}
}

func (q *qmp) register() (int, <-chan reply, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return 0, nil, q.err
	}
	q.next++
	c := make(chan reply, 1)
	q.waiting[q.next] = c
	return q.next, c, nil
}

func (q *qmp) send(id int, command string, arguments any, f *os.File) error {
	message, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        int    `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return err
	}
	var rights []byte
	if f != nil {
		rights = unix.UnixRights(int(f.Fd()))
	}
	q.sending.Lock()
	defer q.sending.Unlock()
	_, _, err = q.conn.WriteMsgUnix(append(message, '\n'), rights, nil)
	return err
}

func finish(command string, r reply, result any) error {
	if r.Error != nil {
		kind := error(errdefs.ErrInternal)
		if r.Error.Class == "DeviceNotFound" {
			kind = errdefs.ErrNotFound
		}
		return fmt.Errorf("qmp %s: %s: %w", command, r.Error.Desc, kind)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.Return, result); err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	return nil
}
