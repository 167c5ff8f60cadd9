// Package framing looks at the headers of what comes from somebody who is not trusted, before the library
// whose protocol it is does.
package framing

import "io"

// Reader passes on a stream of frames, each of them a header of one size and a body of any.
type Reader struct {
	r     io.Reader
	head  []byte // of the next frame, as far as it has come
	size  int    // of a header
	body  uint32 // what is to come of this frame's
	whole int64
	check Check
	err   error
}

// Check looks at a header, and returns how long the body is that follows it. After an error nothing is passed
// on any more, of this frame or any other.
type Check func(head []byte) (body uint32, err error)

// NewReader returns a reader of the frames that r has, whose headers have so many bytes.
func NewReader(r io.Reader, size int, check Check) *Reader {
	return &Reader{r: r, size: size, check: check}
}

// Whole is how many frames were passed on to their end.
func (r *Reader) Whole() int64 { return r.whole }

// Read implements io.Reader. Who reads has the end of a header only after it was checked.
func (r *Reader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	n, err := r.r.Read(p)
	if r.err = r.look(p[:n]); r.err != nil {
		return 0, r.err
	}
	return n, err
}

func (r *Reader) look(p []byte) error {
	for len(p) > 0 {
		if r.body > 0 {
			n := min(uint32(len(p)), r.body)
			p, r.body = p[n:], r.body-n
		} else {
			n := min(len(p), r.size-len(r.head))
			r.head, p = append(r.head, p[:n]...), p[n:]
			if len(r.head) < r.size {
				return nil
			}
			var err error
			if r.body, err = r.check(r.head); err != nil {
				return err
			}
			r.head = r.head[:0]
		}
		if r.body == 0 {
			r.whole++
		}
	}
	return nil
}
