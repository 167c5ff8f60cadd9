package share

import (
	"context"
	"errors"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/internal/hungfs"
)

// TestOpenHangs: a directory whose file system does not answer is given up, and asking again does not begin
// anew.
func TestOpenHangs(t *testing.T) {
	dir, end := hungfs.Mount(t)
	p := newServed(Pod{}, nil)
	defer p.end()
	d := Dir{Tag: "t", Path: filepath.Join(dir, "x")}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	before := runtime.NumGoroutine()
	for range 5 {
		if _, err := p.open(short, d); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	}
	if more := runtime.NumGoroutine() - before; more > 1 {
		t.Errorf("%d goroutines hang", more)
	}
	end()
	if _, err := p.open(t.Context(), d); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after its end: %v", err)
	}
}
