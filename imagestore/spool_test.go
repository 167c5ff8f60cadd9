package imagestore

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/caisson-vm/caisson/imagestore/internal/torture"
)

func TestSpool(t *testing.T) {
	content := []byte(torture.Noise(20<<20, 1))
	for name, test := range map[string]struct {
		before int // bytes written before the reader comes
		keep   bool
	}{
		"reader first": {0, false}, "reader in the middle": {5 << 20, false}, "reader last": {len(content), false}, "kept": {5 << 20, true},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := newSpool(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			s.keep = test.keep
			write := func(from, to int) {
				for at := from; at < to; at += spoolBufferSize {
					if err := s.write(t.Context(), content[at:min(to, at+spoolBufferSize)]); err != nil {
						t.Error(err)
					}
				}
			}
			write(0, test.before)
			r := s.reader(t.Context())
			go func() {
				write(test.before, len(content))
				s.end(nil)
			}()
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, content) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			if n := len(s.free) + len(s.mem); n > 0 {
				t.Errorf("%d buffers are kept until the end of the pull", n)
			}
			info, err := s.f.Stat()
			if err != nil || test.before == 0 && info.Size() != 0 {
				t.Errorf("file of %d bytes, %v", info.Size(), err)
			}
			if !test.keep {
				return
			}
			if got, err := io.ReadAll(s.reader(t.Context())); err != nil || !bytes.Equal(got, content) {
				t.Errorf("second time: %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestSpoolEnds(t *testing.T) {
	why := errors.New("why")
	ctx, cancel := context.WithCancelCause(t.Context())
	s, err := newSpool(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	r := s.reader(ctx)
	full := make(chan error)
	go func() {
		for {
			if err := s.write(ctx, make([]byte, 1000)); err != nil {
				full <- err
				return
			}
		}
	}()
	if _, err := r.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	cancel(why)
	if err := <-full; !errors.Is(err, why) {
		t.Errorf("writer of a full spool: %v", err)
	}
	s.end(errors.New("broken off"))
	if err := r.result(); err == nil {
		t.Error("a layer broken off counts as whole")
	}
	if err := os.Remove(s.f.Name()); err == nil {
		t.Error("the file has a name")
	}
}
