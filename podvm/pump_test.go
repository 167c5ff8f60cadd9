package podvm

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm/vmmtest"
)

// guestFunc is a guest whose streams are answered by a function.
type guestFunc func(h agent.Header, c net.Conn)

func (g guestFunc) Dial(context.Context, uint32) (net.Conn, error) {
	ours, theirs, err := vmmtest.Pair()
	if err != nil {
		return nil, err
	}
	go func() {
		defer theirs.Close()
		var h agent.Header
		if agent.ReadMessage(theirs, &h) == nil {
			g(h, theirs)
		}
	}()
	return ours, nil
}

func newLog(t *testing.T, dir string) *logWriter {
	t.Helper()
	w, err := newLogWriter(filepath.Join(dir, "0.log"), filepath.Join(dir, "pos"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.close() })
	return w
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestPumpThroughBrokenStreams moves output whose stream breaks, in a frame, between two and before the first,
// and whose disk is full meanwhile.
func TestPumpThroughBrokenStreams(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	all, want := someRecords(r, 2000)
	var acked atomic.Uint64
	var streams atomic.Int64
	c := agent.NewClient(guestFunc(func(h agent.Header, conn net.Conn) {
		if h.Offset < acked.Load() {
			t.Errorf("%d is asked for, %d is acknowledged", h.Offset, acked.Load())
		}
		stream := streams.Add(1)
		if stream == 1 || agent.WriteMessage(conn, agent.Reply{}) != nil {
			return
		}
		w, send := agent.NewFrameWriter(conn), after(all, h.Offset)
		broken := stream < 4
		if broken {
			send = send[:len(send)/3]
		}
		for _, r := range send {
			w.Write(agent.FrameOutput, agent.AppendRecord(nil, r))
		}
		if stream == 2 {
			conn.Write([]byte{byte(agent.FrameOutput), 0})
		}
		if broken {
			return
		}
		w.End(agent.FrameOutput)
		for {
			var b [8]byte
			if _, err := io.ReadFull(conn, b[:]); err != nil {
				return
			}
			acked.Store(binary.BigEndian.Uint64(b[:]))
		}
	}))
	w := newLog(t, smallDisk(t, 512<<10))
	ballast := filepath.Join(filepath.Dir(w.path), "ballast")
	if err := os.WriteFile(ballast, make([]byte, 480<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(time.Second, func() { os.Remove(ballast) })
	if err := pump(soon(t), c, "a", w); err != nil {
		t.Fatal(err)
	}
	if got := logs(t, w.path); !bytes.Equal(got, want) {
		t.Errorf("got %d bytes, want %d", len(got), len(want))
	}
}

func TestPumpOfUnknownContainer(t *testing.T) {
	c := agent.NewClient(guestFunc(func(_ agent.Header, conn net.Conn) {
		agent.WriteMessage(conn, agent.Reply{Error: "no such container", Code: "not found"})
	}))
	if err := pump(soon(t), c, "a", newLog(t, t.TempDir())); err != nil {
		t.Error(err)
	}
}

// TestPumpBoundsFlood has an agent send on and on while nothing can be written.
func TestPumpBoundsFlood(t *testing.T) {
	var sent atomic.Int64
	stuck := make(chan struct{})
	c := agent.NewClient(guestFunc(func(_ agent.Header, conn net.Conn) {
		agent.WriteMessage(conn, agent.Reply{})
		w, offset, line := agent.NewFrameWriter(conn), uint64(0), make([]byte, 1000)
		for {
			conn.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			if w.Write(agent.FrameOutput, agent.AppendRecord(nil, agent.Record{Offset: offset, Line: line})) != nil {
				close(stuck)
				return
			}
			offset += agent.RecordSize(len(line))
			sent.Add(int64(len(line)))
		}
	}))
	w := newLog(t, smallDisk(t, 4096))
	ctx, cancel := context.WithCancel(soon(t))
	ended := make(chan error, 1)
	go func() { ended <- pump(ctx, c, "a", w) }()
	<-stuck
	if n := sent.Load(); n > 8*queueMax {
		t.Errorf("%d bytes were taken from an agent that waits for nothing", n)
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("the pump ended well")
	}
}
