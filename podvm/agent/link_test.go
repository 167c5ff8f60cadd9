package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/containerd/errdefs"
)

// cut is a stream that breaks after so many bytes were written to it.
type cut struct {
	net.Conn
	left int
}

func (c *cut) Write(b []byte) (int, error) {
	n := min(len(b), c.left)
	if c.left -= n; n > 0 {
		if n, err := c.Conn.Write(b[:n]); err != nil {
			return n, err
		}
	}
	if n < len(b) {
		c.Close()
		return n, errors.New("cut")
	}
	return n, nil
}

// linkEnd is an end of a link in a test, with what it has received.
type linkEnd struct {
	*Link
	got  [][]byte
	all  chan struct{} // closed when it has got so many
	want int
}

func newLinkEnd(want int) *linkEnd {
	return &linkEnd{Link: NewLink(), want: want, all: make(chan struct{})}
}

func (e *linkEnd) deliver(_ context.Context, m []byte) error {
	if e.got = append(e.got, m); len(e.got) == e.want {
		close(e.all)
	}
	return nil
}

// join runs both ends on a stream that breaks after so many bytes, and returns when both have ended.
func join(t *testing.T, a, b *linkEnd, toA, toB int) {
	t.Helper()
	ca, cb := net.Pipe()
	a.Take()
	b.Take()
	fromA, fromB := a.Received(), b.Received()
	var both sync.WaitGroup
	both.Go(func() {
		if err := a.Run(&cut{ca, toB}, fromB, a.deliver); err != nil {
			t.Error(err)
		}
	})
	both.Go(func() {
		if err := b.Run(&cut{cb, toA}, fromA, b.deliver); err != nil {
			t.Error(err)
		}
	})
	both.Wait()
}

func TestLinkThroughBreaks(t *testing.T) {
	for seed := range uint64(50) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(seed, 1))
				const messages = 200
				a, b := newLinkEnd(messages), newLinkEnd(messages)
				sent := map[*linkEnd][][]byte{}
				var senders sync.WaitGroup
				for _, e := range []*linkEnd{a, b} {
					var all [][]byte
					for i := range messages {
						m := make([]byte, 4+r.IntN(100))
						if r.IntN(10) == 0 {
							m = make([]byte, r.IntN(MessageMax-4)+4)
						}
						binary.BigEndian.PutUint32(m, uint32(i))
						all = append(all, m)
					}
					sent[e] = all
					senders.Go(func() {
						for _, m := range all {
							if err := e.Send(m); err != nil {
								t.Error(err)
							}
						}
					})
				}
				ended := make(chan struct{})
				go func() {
					<-a.all
					<-b.all
					close(ended)
					a.Close()
					b.Close()
				}()
				for streams := 0; ; streams++ {
					select {
					case <-ended:
						senders.Wait()
						if streams < 2 {
							t.Errorf("only %d streams were needed: nothing broke", streams)
						}
						same(t, a.got, sent[b])
						same(t, b.got, sent[a])
						return
					default:
						join(t, a, b, r.IntN(2<<20), r.IntN(2<<20))
					}
				}
			})
		})
	}
}

func same(t *testing.T, got, want [][]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("got %d messages, want %d", len(got), len(want))
	}
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("message %d is another one", i)
		}
	}
}

// TestLinkForgets shows that an end that only receives acknowledges, so that the other's memory is bounded.
func TestLinkForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newLinkEnd(0), newLinkEnd(1000)
		go join(t, a, b, 1<<30, 1<<30)
		for range 1000 {
			if err := a.Send(make([]byte, 100<<10)); err != nil {
				t.Fatal(err)
			}
		}
		<-b.all
		synctest.Wait()
		if a.bytes > oweBytes+MessageMax {
			t.Errorf("%d bytes are kept, of which the other end should have acknowledged most", a.bytes)
		}
		a.Close()
		b.Close()
		synctest.Wait()
	})
}

// TestLinkFull shows that a sender waits for an end that does not acknowledge, and that Close ends it.
func TestLinkFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink()
		sent, ended := 0, make(chan error, 1)
		go func() {
			for {
				if err := l.Send(make([]byte, 64<<10)); err != nil {
					ended <- err
					return
				}
				sent++
			}
		}()
		synctest.Wait()
		if sent != linkKept/(64<<10) {
			t.Errorf("%d messages were taken without a stream", sent)
		}
		l.Close()
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Send after Close: %v", err)
		}
	})
}

// TestLinkBusy has one end answer in a few workers, which wait for acknowledgements that come behind further
// requests.
func TestLinkBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const requests = 300
		a, b := newLinkEnd(requests), NewLink()
		workers := make(chan struct{}, 4)
		work := func(context.Context, []byte) error {
			workers <- struct{}{}
			go func() {
				defer func() { <-workers }()
				b.Send(make([]byte, 256<<10))
			}()
			return nil
		}
		ca, cb := net.Pipe()
		a.Take()
		b.Take()
		go a.Run(ca, 0, a.deliver)
		go b.Run(cb, 0, work)
		for range requests {
			if err := a.Send(make([]byte, 80)); err != nil {
				t.Fatal(err)
			}
		}
		<-a.all
		a.Close()
		b.Close()
		synctest.Wait()
	})
}

// TestLinkUndelivered shows that a message that could not be delivered comes again.
func TestLinkUndelivered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newLinkEnd(1), newLinkEnd(1)
		if err := a.Send([]byte("once")); err != nil {
			t.Fatal(err)
		}
		run := func(l *Link, c net.Conn, received uint64, d Deliver) {
			l.Take()
			go l.Run(c, received, d)
		}
		ca, cb := net.Pipe()
		refused := errors.New("refused")
		run(a.Link, ca, 0, a.deliver)
		b.Take()
		if err := b.Run(cb, 0, func(context.Context, []byte) error { return refused }); !errors.Is(err, refused) {
			t.Fatalf("Run: %v", err)
		}
		ca, cb = net.Pipe()
		run(a.Link, ca, b.Received(), a.deliver)
		run(b.Link, cb, a.Received(), b.deliver)
		<-b.all
		if string(b.got[0]) != "once" {
			t.Errorf("got %q", b.got)
		}
		a.Close()
		b.Close()
		synctest.Wait()
	})
}

// TestLinkHostile gives a link what no honest end sends.
func TestLinkHostile(t *testing.T) {
	head := func(received uint64, size uint32) []byte {
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, received), size)
	}
	for name, c := range map[string]struct {
		received uint64 // at the beginning
		bytes    []byte
	}{
		"more received than sent":          {received: 2},
		"acknowledges what was not sent":   {bytes: head(2, 0)},
		"acknowledges a huge number":       {bytes: head(1<<63, 0)},
		"a message over the limit":         {bytes: head(0, MessageMax+1)},
		"a message as long as can be said": {bytes: head(0, 1<<32-1)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewLink()
				if err := l.Send([]byte("kept")); err != nil {
					t.Fatal(err)
				}
				ours, theirs := net.Pipe()
				ended := make(chan error, 1)
				l.Take()
				go func() {
					ended <- l.Run(ours, c.received, func(context.Context, []byte) error { return nil })
				}()
				if c.bytes != nil {
					theirs.Read(make([]byte, linkHead+len("kept")))
					theirs.Write(c.bytes)
				}
				if err := <-ended; !errors.Is(err, errdefs.ErrInvalidArgument) {
					t.Errorf("Run: %v", err)
				}
				theirs.Close()
			})
		})
	}
}
