package imagestore

import (
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/caisson-vm/caisson/imagestore/erofs"
	"github.com/caisson-vm/caisson/imagestore/internal/torture"
)

// TestWorkIsBounded has layers that take little, packed and in the image, and much to read.
func TestWorkIsBounded(t *testing.T) {
	const limit = 20 << 20
	file := torture.NewTar()
	file.File("file", strings.Repeat("x", 1<<20))
	zeros := append(small("x").layers[0], make([]byte, 2*limit)...) // behind the archive's end
	for name, test := range map[string]struct {
		plain []byte
		times int
		ok    bool
	}{
		"a layer":             {file.Bytes(), 1, true},
		"a layer, some times": {file.Bytes(), limit>>20 - 1, true},
		"a layer, many times": {file.Bytes(), limit>>20 + 1, false},
		"zeros at the end":    {zeros, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(t.TempDir(), "image"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			s, err := newSpool(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			s.keep = true
			if err := s.write(t.Context(), gzipped(test.plain)); err != nil {
				t.Fatal(err)
			}
			s.end(nil)
			var unpacked atomic.Int64
			c := converter{w: erofs.NewWriter(f, [16]byte{}, erofs.Limits{}), unpacked: &unpacked, limit: limit}
			for range test.times {
				c.layers, c.diffIDs = append(c.layers, s), append(c.diffIDs, digest.FromBytes(test.plain))
			}
			switch err := c.merge(t.Context()); {
			case test.ok && err != nil:
				t.Error(err)
			case !test.ok && (!errdefs.IsResourceExhausted(err) || unpacked.Load() > limit+2*parallelLayers*aheadSize):
				t.Errorf("%d bytes were unpacked: %v", unpacked.Load(), err)
			}
		})
	}
}
