package guest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// TestOutputBuffer adds, reads, resumes and acknowledges at random: every record comes in its turn and
// as it was written, wherever the buffer has it.
func TestOutputBuffer(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		o := newOutput()
		line := func(i int) []byte {
			return bytes.Repeat([]byte{byte(i)}, 1+(i*7919)%(agent.LineMax/int(1+seed)))
		}
		offsets := []uint64{0} // of record i
		acked := 0
		for range 400 {
			for range rnd.IntN(40) {
				if n, _ := o.fill([]agent.Record{{Line: line(len(offsets) - 1)}}); n == 0 {
					break
				}
				offsets = append(offsets, o.next)
			}
			checkFrom(t, o, offsets, acked+rnd.IntN(len(offsets)-acked), line)
			acked += rnd.IntN(len(offsets) - acked)
			if err := o.ack(offsets[acked]); err != nil {
				t.Fatal(err)
			}
			if len(o.frames) > keepMax || len(o.store) > 2*keepMax {
				t.Fatalf("keeps %d bytes in %d", len(o.frames), len(o.store))
			}
		}
		if err := o.ack(o.next); err != nil || len(o.store) > sendMax {
			t.Fatalf("idle, and keeps %d bytes: %v", len(o.store), err)
		}
	}
}

// checkFrom reads the kept records from number i on.
func checkFrom(t *testing.T, o *output, offsets []uint64, i int, line func(int) []byte) {
	t.Helper()
	r, err := o.open(offsets[i])
	if err != nil {
		t.Fatal(err)
	}
	for i < len(offsets)-1 {
		b, err := r.next(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		frames := agent.NewFrameReader(bytes.NewReader(b))
		for {
			_, body, err := frames.Read()
			if err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			rec, err := agent.ParseRecord(body)
			if err != nil || rec.Offset != offsets[i] || !bytes.Equal(rec.Line, line(i)) {
				t.Fatalf("record %d: %v, at %d of %d bytes", i, err, rec.Offset, len(rec.Line))
			}
			i++
		}
	}
}

// BenchmarkOutput moves lines from a pipe to the host's client over a socket.
func BenchmarkOutput(b *testing.B) {
	for _, size := range []int{100, 8 << 10} {
		b.Run(fmt.Sprintf("line=%d", size), func(b *testing.B) { benchmarkOutput(b, size) })
	}
}

func benchmarkOutput(b *testing.B, size int) {
	chunk := bytes.Repeat(append(bytes.Repeat([]byte("x"), size-1), '\n'), (64<<10)/size)
	b.SetBytes(int64(len(chunk)))
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	c := &container{a: &Agent{}, id: "one", io: &stdio{stdout: r}, out: newOutput(), state: &agent.ContainerState{Id: "one"}}
	c.a.containers = map[string]*container{"one": c}
	l, err := net.Listen("unix", filepath.Join(b.TempDir(), "sock"))
	if err != nil {
		b.Fatal(err)
	}
	go c.a.Serve(b.Context(), l)
	o, err := agent.NewClient(dialer(l.Addr().String())).Output(context.Background(), "one", 0)
	if err != nil {
		b.Fatal(err)
	}
	defer o.Close()
	b.ReportAllocs()
	b.ResetTimer()
	go func() { c.relayOne(r, agent.FrameStdout); c.out.end() }()
	go func() {
		for range b.N {
			w.Write(chunk)
		}
		w.Close()
	}()
	got, acked := 0, 0
	for {
		rec, err := o.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			b.Fatal(err)
		}
		if got += len(rec.Line) + 1; got-acked > 256<<10 {
			if err := o.Ack(rec.Offset + agent.RecordSize(len(rec.Line))); err != nil {
				b.Fatal(err)
			}
			acked = got
		}
	}
	if got != b.N*len(chunk) {
		b.Fatalf("got %d bytes of %d", got, b.N*len(chunk))
	}
}
