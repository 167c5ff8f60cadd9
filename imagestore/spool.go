package imagestore

import (
	"context"
	"io"
	"os"
	"sync"
)

// spool is a file that one goroutine fills while another reads it: a layer on its way. The file has
// no name, so nothing of it outlives the daemon.
type spool struct {
	f *os.File

	mu      sync.Mutex // guards what follows
	changed sync.Cond
	written int64
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
	s := &spool{f: f}
	s.changed.L = &s.mu
	return s, nil
}

// Write appends p.
func (s *spool) Write(p []byte) (int, error) {
	n, err := s.f.Write(p)
	s.mu.Lock()
	s.written += int64(n)
	s.mu.Unlock()
	s.changed.Broadcast()
	return n, err
}

// end says that all is written, or that err came in between.
func (s *spool) end(err error) {
	s.mu.Lock()
	if !s.ended {
		s.ended, s.err = true, err
	}
	s.mu.Unlock()
	s.changed.Broadcast()
}

// wait returns how much is written, as soon as it is more than n or the writer has ended. At the
// end it returns the writer's error, or EOF.
func (s *spool) wait(ctx context.Context, n int64) (int64, error) {
	stop := context.AfterFunc(ctx, func() {
		s.mu.Lock() // so that no waiter is between its check and its sleep
		defer s.mu.Unlock()
		s.changed.Broadcast()
	})
	defer stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.written <= n && !s.ended && ctx.Err() == nil {
		s.changed.Wait()
	}
	switch {
	case s.ended && s.err != nil:
		return s.written, s.err
	case ctx.Err() != nil:
		return s.written, context.Cause(ctx)
	case s.ended && s.written <= n:
		return s.written, io.EOF
	}
	return s.written, nil
}

// result waits for the writer's end and returns its error.
func (s *spool) result(ctx context.Context) error {
	for n := int64(0); ; {
		written, err := s.wait(ctx, n)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		n = written
	}
}

func (s *spool) close() { s.f.Close() } // nothing is lost: the file has no name

// reader returns a reader of the spool from its start, which waits for the writer.
func (s *spool) reader(ctx context.Context) io.Reader { return &spoolReader{ctx: ctx, s: s} }

// spoolReader carries a context because io.Reader has no place for one; it lives within one call.
type spoolReader struct {
	ctx     context.Context
	s       *spool
	at, end int64
}

func (r *spoolReader) Read(p []byte) (int, error) {
	if r.at == r.end {
		end, err := r.s.wait(r.ctx, r.at)
		if err != nil {
			return 0, err
		}
		r.end = end
	}
	n, err := r.s.f.ReadAt(p[:min(int64(len(p)), r.end-r.at)], r.at)
	r.at += int64(n)
	return n, err
}
