package imagestore

import (
	"context"
	"io"
	"os"
	"sync"
)

const (
	spoolBuffers, spoolBufferSize = 16, 128 << 10
)

// spool carries a layer from the goroutine that downloads it to the one that reads it. Before its
// reader has come it collects the layer in a file; from then on, in a few buffers, so that the
// layer whose turn it is does not touch the disk, and a slow reader slows the download down.
// The file has no name, so nothing of it outlives the daemon.
type spool struct {
	f    *os.File
	keep bool // it is read more than once: all goes to the file

	mem, free chan []byte

	mu      sync.Mutex // guards what follows
	changed sync.Cond
	filed   int64 // bytes in the file
	reading bool
	direct  bool // the writer has gone over from the file to mem
	ended   bool
	err     error // of the writer, once ended
}

func newSpool(dir string) (*spool, error) {
	f, err := os.CreateTemp(dir, "layer-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	s := &spool{f: f, mem: make(chan []byte, spoolBuffers), free: make(chan []byte, spoolBuffers)}
	s.changed.L = &s.mu
	return s, nil
}

// write appends p.
func (s *spool) write(ctx context.Context, p []byte) error {
	if !s.goDirect() {
		n, err := s.f.Write(p)
		s.mu.Lock()
		s.filed += int64(n)
		s.mu.Unlock()
		s.changed.Broadcast()
		return err
	}
	select {
	case buf := <-s.free:
		s.mem <- append(buf[:0], p...) // there are no more buffers than fit
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// goDirect decides whether the next piece goes to the file or to memory.
func (s *spool) goDirect() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.direct && s.reading && !s.keep {
		s.direct = true
		for range spoolBuffers {
			s.free <- make([]byte, 0, spoolBufferSize)
		}
		s.changed.Broadcast()
	}
	return s.direct
}

// end says that all is written, or that err came in between. Only the first call counts.
func (s *spool) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.ended, s.err = true, err
		close(s.mem)
		s.changed.Broadcast()
	}
}

// wait returns how much the file has, as soon as that is more than n. direct tells that no more
// comes there. At the end of the layer it returns the writer's error, or EOF.
func (s *spool) wait(ctx context.Context, n int64) (filed int64, direct bool, err error) {
	stop := context.AfterFunc(ctx, func() {
		s.mu.Lock() // so that no waiter is between its check and its sleep
		defer s.mu.Unlock()
		s.changed.Broadcast()
	})
	defer stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.filed <= n && !s.ended && !s.direct && ctx.Err() == nil {
		s.changed.Wait()
	}
	switch {
	case s.ended && s.err != nil:
		err = s.err
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case s.ended && !s.direct && s.filed <= n:
		err = io.EOF
	}
	return s.filed, s.direct, err
}

// receive returns the next piece from memory.
func (s *spool) receive(ctx context.Context) ([]byte, error) {
	select {
	case buf, ok := <-s.mem:
		if ok {
			return buf, nil
		}
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	for len(s.free) > 0 { // nobody writes any more: they need not wait for the end of the pull
		<-s.free
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	return nil, io.EOF
}

// recycle gives a piece from receive back.
func (s *spool) recycle(buf []byte) { s.free <- buf }

func (s *spool) close() { s.f.Close() } // nothing is lost: the file has no name

// reader returns a reader of the whole layer, which waits for the writer.
func (s *spool) reader(ctx context.Context) *spoolReader {
	s.mu.Lock()
	s.reading = true
	s.mu.Unlock()
	return &spoolReader{ctx: ctx, s: s}
}

// spoolReader carries a context because io.Reader has no place for one; it lives within one call.
type spoolReader struct {
	ctx       context.Context
	s         *spool
	at, end   int64 // read from the file, and known to be there
	buf, rest []byte
}

func (r *spoolReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 && r.at == r.end {
		if err := r.more(); err != nil {
			return 0, err
		}
	}
	if len(r.rest) > 0 {
		n := copy(p, r.rest)
		r.rest = r.rest[n:]
		return n, nil
	}
	n, err := r.s.f.ReadAt(p[:min(int64(len(p)), r.end-r.at)], r.at)
	r.at += int64(n)
	return n, err
}

// more waits until there is something to read, in the file or in memory.
func (r *spoolReader) more() error {
	filed, direct, err := r.s.wait(r.ctx, r.at)
	if err != nil {
		return err
	}
	r.end = filed
	if r.at < filed || !direct {
		return nil
	}
	if r.buf != nil {
		r.s.recycle(r.buf)
		r.buf = nil
	}
	r.buf, err = r.s.receive(r.ctx)
	r.rest = r.buf
	return err
}

// result reads what is left and returns the writer's error.
func (r *spoolReader) result() error {
	for {
		if err := r.more(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		r.at, r.rest = r.end, nil
	}
}
