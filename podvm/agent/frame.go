package agent

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

const frameHead = 1 + 4

// FrameWriter writes frames to a stream. It may be used concurrently.
type FrameWriter struct {
	mu  sync.Mutex
	w   io.Writer
	buf []byte
}

// NewFrameWriter returns a writer of frames to w.
func NewFrameWriter(w io.Writer) *FrameWriter { return &FrameWriter{w: w} }

// Write writes one frame, in one write. More than FrameMax bytes are an error.
func (f *FrameWriter) Write(t FrameType, body []byte) error {
	if len(body) > FrameMax {
		return fmt.Errorf("frame of %d bytes is over the limit of %d", len(body), FrameMax)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.buf = append(f.buf[:0], byte(t))
	f.buf = binary.BigEndian.AppendUint32(f.buf, uint32(len(body)))
	f.buf = append(f.buf, body...)
	_, err := f.w.Write(f.buf)
	return err
}

// Stream returns a writer whose every write becomes frames of one type. A write of nothing writes
// nothing: the empty frame is the end of file, see End.
func (f *FrameWriter) Stream(t FrameType) io.Writer { return frameStream{f, t} }

// End writes the end of file of a stream.
func (f *FrameWriter) End(t FrameType) error { return f.Write(t, nil) }

type frameStream struct {
	f *FrameWriter
	t FrameType
}

func (s frameStream) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n := min(len(p)-done, FrameMax)
		if err := s.f.Write(s.t, p[done:done+n]); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// FrameReader reads frames from a stream.
type FrameReader struct {
	r    io.Reader
	head [frameHead]byte
	body []byte
}

// NewFrameReader returns a reader of the frames of r. It reads ahead nothing.
func NewFrameReader(r io.Reader) *FrameReader { return &FrameReader{r: r} }

// Read reads one frame; the body is valid until the next Read. The end of the stream between
// frames is io.EOF; inside of one it is io.ErrUnexpectedEOF.
func (f *FrameReader) Read() (FrameType, []byte, error) {
	if _, err := io.ReadFull(f.r, f.head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(f.head[1:])
	if n > FrameMax {
		return 0, nil, fmt.Errorf("frame of %d bytes is over the limit of %d", n, FrameMax)
	}
	if uint32(cap(f.body)) < n {
		f.body = make([]byte, n)
	}
	body := f.body[:n]
	if _, err := io.ReadFull(f.r, body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return FrameType(f.head[0]), body, nil
}

// WindowSize is the size of a terminal, in characters.
type WindowSize struct{ Width, Height uint16 }

// AppendWindowSize appends the content of a FrameResize.
func AppendWindowSize(b []byte, s WindowSize) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, s.Width), s.Height)
}

// ParseWindowSize reads what AppendWindowSize wrote.
func ParseWindowSize(b []byte) (WindowSize, error) {
	if len(b) != 4 {
		return WindowSize{}, fmt.Errorf("malformed terminal size of %d bytes", len(b))
	}
	return WindowSize{binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])}, nil
}
