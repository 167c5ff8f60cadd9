package passthrough

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// TestPanicsLogOnce has a guest find one that it can repeat.
func TestPanicsLogOnce(t *testing.T) {
	var out bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&out, nil)))
	defer slog.SetDefault(before)
	f := serveDir(t, t.TempDir())
	handler := f.Options().PanicHandler
	for i := range 3 {
		if code := handler("found"); code != fuse.EIO {
			t.Errorf("panic %d: %v", i, code)
		}
	}
	if n := strings.Count(out.String(), "panic=found"); n != 1 || !strings.Contains(out.String(), "stack=") {
		t.Errorf("%d are logged: %s", n, out.String())
	}
}
