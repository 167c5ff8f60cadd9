package framing

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"
)

// pieces has each read return some bytes less than it might.
type pieces struct {
	io.Reader
	rnd *rand.Rand
}

func (p pieces) Read(b []byte) (int, error) { return p.Reader.Read(b[:1+p.rnd.IntN(len(b))]) }

// frame is a header that says how long the body is, and what number the frame has.
func frame(number, body int) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(body))
	return append(append(b, byte(number)), bytes.Repeat([]byte{0xff}, body)...)
}

// TestEveryHeaderIsSeen cuts frames anywhere: what comes out is what went in, and every header was looked at.
func TestEveryHeaderIsSeen(t *testing.T) {
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var sent []byte
		var want []byte
		for i := range 200 {
			sent, want = append(sent, frame(i, rnd.IntN(4)*rnd.IntN(1000))...), append(want, byte(i))
		}
		var seen []byte
		r := NewReader(pieces{bytes.NewReader(sent), rnd}, 3, func(head []byte) (uint32, error) {
			seen = append(seen, head[2])
			return uint32(binary.BigEndian.Uint16(head)), nil
		})
		got, err := io.ReadAll(pieces{r, rnd})
		if err != nil || !bytes.Equal(got, sent) || !slices.Equal(seen, want) || r.Whole() != int64(len(want)) {
			t.Fatalf("%v; %d bytes of %d, headers %v, %d whole frames", err, len(got), len(sent), seen, r.Whole())
		}
	}
}

// TestNothingAfterARefusal: whoever reads on gets nothing of a frame that was refused, nor of the next.
func TestNothingAfterARefusal(t *testing.T) {
	refused := errors.New("refused")
	sent := slices.Concat(frame(0, 5), frame(1, 5), frame(2, 5))
	r := NewReader(iotest.OneByteReader(bytes.NewReader(sent)), 3, func(head []byte) (uint32, error) {
		if head[2] == 1 {
			return 0, refused
		}
		return 5, nil
	})
	got, err := io.ReadAll(r)
	if !errors.Is(err, refused) || len(got) > 3+5+2 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if n, err := r.Read(make([]byte, 100)); n != 0 || !errors.Is(err, refused) {
		t.Errorf("then %d bytes, %v", n, err)
	}
}

func FuzzReader(f *testing.F) {
	f.Add(slices.Concat(frame(0, 5), frame(1, 0), frame(2, 1000)), uint16(7))
	f.Fuzz(func(t *testing.T, sent []byte, piece uint16) {
		check := func(head []byte) (uint32, error) { return binary.BigEndian.Uint32(head), nil }
		r := NewReader(bytes.NewReader(sent), 4, check)
		var got []byte
		for b := make([]byte, 1+int(piece)); ; {
			n, err := r.Read(b)
			if got = append(got, b[:n]...); err != nil {
				break
			}
		}
		if !bytes.Equal(got, sent) {
			t.Errorf("%x became %x", sent, got)
		}
	})
}
