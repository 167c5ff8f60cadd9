package share

import (
	"context"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// breaking is a guest, and the process of its pod, of whose streams each ends as soon as it has begun.
type breaking struct{ dials atomic.Int32 }

// Dial implements agent.Dialer, as a driver does whose streams go through the daemon.
func (b *breaking) Dial(ctx context.Context, _ uint32) (net.Conn, error) {
	if b.dials.Add(1) > 100 { // without pauses no time would pass
		<-ctx.Done()
		return nil, ctx.Err()
	}
	host, guest := net.Pipe()
	guest.Close()
	return host, nil
}

// serve answers what a process is asked.
func (b *breaking) serve(l *net.UnixListener) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		if _, stream, err := accept(conn); err == nil {
			agent.WriteMessage(conn, response{Placed: true})
			if stream != nil {
				stream.Close()
			}
		}
		conn.Close()
	}
}

// TestMendPauses: a stream that breaks is mended at once; one that does so again and again, later each time.
func TestMendPauses(t *testing.T) {
	run := t.TempDir()
	if err := os.Mkdir(folder(run), 0o700); err != nil {
		t.Fatal(err)
	}
	// What blocks in the kernel stands outside of the bubble, whose time would stand still.
	lives, err := process.Start(process.Spec{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lives.Kill(context.Background()) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketPath(folder(run)), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	guest := &breaking{}
	go guest.serve(l)
	synctest.Test(t, func(t *testing.T) {
		p := newServed(Pod{ID: "pod", Dir: run, Guest: guest}, nil)
		defer p.end()
		p.process = lives
		serve := func(dirs map[string]Dir) {
			p.turn <- struct{}{}
			p.dirs = dirs
			p.unlock()
			p.look()
		}
		broken := map[string]Dir{"d": {Tag: "d", Path: "/d"}}
		for _, when := range []string{"first", "after a calm"} {
			guest.dials.Store(0)
			serve(broken)
			time.Sleep(pauseMin / 2)
			if n := guest.dials.Load(); n != 1 {
				t.Errorf("%s: the guest is dialled %d times at once", when, n)
			}
			time.Sleep(10 * time.Minute)
			if n := guest.dials.Load(); n < 10 || n > 20 {
				t.Errorf("%s: the guest is dialled %d times in 10 minutes", when, n)
			}
			serve(nil)
			time.Sleep(calm + 2*pauseMax)
		}
	})
}
