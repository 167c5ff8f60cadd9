package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// epoch is the time of everything that has no other, so that images are the same on every build.
var epoch = time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC)

// Entry is one file of a layer.
type Entry struct {
	tar.Header
	Data []byte
}

// Layer is a layer under construction: entries in the order of the archive.
type Layer struct {
	Entries []Entry
	parents map[string]bool
}

// add appends an entry, its parents first where the layer has none of them yet.
func (l *Layer) add(h tar.Header, data []byte) *Layer {
	h.Name = strings.TrimPrefix(h.Name, "/")
	if l.parents == nil {
		l.parents = map[string]bool{}
	}
	if parent := path.Dir(strings.TrimSuffix(h.Name, "/")); parent != "." && !l.parents[parent] {
		l.Dir(parent, 0o755)
	}
	if h.Typeflag == tar.TypeDir {
		l.parents[strings.TrimSuffix(h.Name, "/")] = true
	}
	if h.ModTime.IsZero() {
		h.ModTime = epoch
	}
	h.Size = int64(len(data))
	h.Format = tar.FormatPAX
	l.Entries = append(l.Entries, Entry{h, data})
	return l
}

// Dir adds a directory of root's.
func (l *Layer) Dir(name string, mode int64) *Layer {
	return l.add(tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimSuffix(name, "/") + "/", Mode: mode}, nil)
}

// File adds a regular file of root's.
func (l *Layer) File(name string, mode int64, data string) *Layer {
	return l.add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, []byte(data))
}

// Symlink adds a symbolic link.
func (l *Layer) Symlink(name, target string) *Layer {
	return l.add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil)
}

// Link adds a hard link to a file of this layer or of one of those below. Like every archiver it
// repeats what the file itself has as owner, mode and time, since unpackers apply it.
func (l *Layer) Link(name, target string, below ...*Layer) *Layer {
	target = strings.TrimPrefix(target, "/")
	for _, layer := range append([]*Layer{l}, below...) {
		for _, e := range layer.Entries {
			if e.Name == target {
				h := e.Header
				h.Typeflag, h.Name, h.Linkname = tar.TypeLink, name, target
				return l.add(h, nil)
			}
		}
	}
	panic("link to " + target + ", which is in none of the layers")
}

// Whiteout deletes what lower layers have under the name.
func (l *Layer) Whiteout(name string) *Layer {
	dir, file := path.Split(name)
	return l.File(dir+".wh."+file, 0o644, "")
}

// Opaque hides what lower layers have in the directory.
func (l *Layer) Opaque(dir string) *Layer {
	return l.File(path.Join(dir, ".wh..wh..opq"), 0o644, "")
}

// Copy adds files and symbolic links from an unpacked root, under their own names.
func (l *Layer) Copy(root string, files ...string) error {
	for _, file := range files {
		if err := l.CopyAs(root, file, file); err != nil {
			return err
		}
	}
	return nil
}

// CopyAs adds a file or symbolic link from an unpacked root under another name.
func (l *Layer) CopyAs(root, file, name string) error {
	at := filepath.Join(root, file)
	info, err := os.Lstat(at)
	if err != nil {
		return fmt.Errorf("copy %s: %w", file, err)
	}
	if info.Mode()&os.ModeSymlink != 0 {
		target, err := os.Readlink(at)
		if err != nil {
			return fmt.Errorf("copy %s: %w", file, err)
		}
		l.Symlink(name, target)
		return nil
	}
	data, err := os.ReadFile(at)
	if err != nil {
		return fmt.Errorf("copy %s: %w", file, err)
	}
	l.File(name, int64(info.Mode().Perm()), string(data))
	return nil
}

// Build archives the layer, compressed by gzip or zstd.
func (l *Layer) Build(c compression.Compression) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range l.Entries {
		if err := w.WriteHeader(&e.Header); err != nil {
			return nil, fmt.Errorf("archive %s: %w", e.Name, err)
		}
		if _, err := w.Write(e.Data); err != nil {
			return nil, fmt.Errorf("archive %s: %w", e.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("archive layer: %w", err)
	}
	return layerOf(b.Bytes(), c)
}

// layerOf makes a layer of bytes that should be, but need not be, an archive.
func layerOf(data []byte, c compression.Compression) (v1.Layer, error) {
	kind := types.OCILayer
	if c == compression.ZStd {
		kind = types.OCILayerZStd
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	return tarball.LayerFromOpener(open, tarball.WithMediaType(kind), tarball.WithCompression(c), tarball.WithCompressedCaching)
}
