package agent

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"

	"github.com/containerd/errdefs"
)

// IO is what a caller joins to a process; nil parts are not wanted. With a TTY all output comes on
// Stdout.
type IO struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Resize may be nil. It need not be closed.
	Resize <-chan WindowSize
}

// Exec is a process to run in a container.
type Exec struct {
	Container string
	// Process is an OCI process (JSON). What it leaves out is as the container's own process has it.
	Process json.RawMessage
	TTY     bool
}

// Exec runs a process in a running container and returns its exit code once all its output has
// been written: 128 and the signal's number if it was killed by a signal. When ctx ends first the
// process is killed. A container that does not run is ErrFailedPrecondition, a command that is not
// there ErrNotFound.
func (c *Client) Exec(ctx context.Context, e Exec, stdio IO) (int32, error) {
	conn, err := c.open(ctx, Header{Kind: KindExec, Container: e.Container, Process: e.Process, TTY: e.TTY,
		Stdin: stdio.Stdin != nil, Stdout: stdio.Stdout != nil, Stderr: stdio.Stderr != nil})
	if err != nil {
		return 0, err
	}
	code, err := relay(ctx, conn, stdio)
	if err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", e.Container, err)
	}
	return code, nil
}

// Attach joins a container's own process until the process ends, the context ends, or the stream
// breaks. The end of Stdin is passed on only where the container closes its stdin with its first
// client (CreateRequest.stdin_once).
func (c *Client) Attach(ctx context.Context, container string, tty bool, stdio IO) error {
	conn, err := c.open(ctx, Header{Kind: KindAttach, Container: container, TTY: tty,
		Stdin: stdio.Stdin != nil, Stdout: stdio.Stdout != nil, Stderr: stdio.Stderr != nil})
	if err != nil {
		return err
	}
	if _, err := relay(ctx, conn, stdio); err != nil {
		return fmt.Errorf("attach to container %s: %w", container, err)
	}
	return nil
}

// relay moves frames until the exit code comes. It closes conn.
func relay(ctx context.Context, conn net.Conn, stdio IO) (int32, error) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	done := make(chan struct{})
	defer close(done)
	w := NewFrameWriter(conn)
	if stdio.Stdin != nil {
		go sendStdin(w, stdio.Stdin)
	}
	if stdio.Resize != nil {
		go sendSizes(w, stdio.Resize, done)
	}
	code, err := receive(NewFrameReader(conn), stdio)
	if err != nil && ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	return code, err
}

// sendStdin ends at the input's end, or with the stream, whose failure is for receive to tell.
func sendStdin(w *FrameWriter, in io.Reader) {
	io.Copy(w.Stream(FrameStdin), in)
	w.End(FrameStdin)
}

func sendSizes(w *FrameWriter, sizes <-chan WindowSize, done <-chan struct{}) {
	for {
		select {
		case size, ok := <-sizes:
			if !ok || w.Write(FrameResize, AppendWindowSize(nil, size)) != nil {
				return
			}
		case <-done:
			return
		}
	}
}

func receive(r *FrameReader, stdio IO) (int32, error) {
	for {
		t, body, err := r.Read()
		if err != nil {
			return 0, fmt.Errorf("the stream from the agent broke: %w: %w", err, errdefs.ErrUnavailable)
		}
		switch t {
		case FrameStdout:
			err = deliver(stdio.Stdout, body)
		case FrameStderr:
			err = deliver(stdio.Stderr, body)
		case FrameExit:
			if len(body) != 4 {
				return 0, fmt.Errorf("malformed exit code of %d bytes: %w", len(body), errdefs.ErrInternal)
			}
			return int32(binary.BigEndian.Uint32(body)), nil
		default:
			return 0, fmt.Errorf("unexpected frame of type %d from the agent: %w", t, errdefs.ErrInternal)
		}
		if err != nil {
			return 0, fmt.Errorf("write output: %w", err)
		}
	}
}

func deliver(w io.Writer, body []byte) error {
	if w == nil || len(body) == 0 {
		return nil
	}
	_, err := w.Write(body)
	return err
}
