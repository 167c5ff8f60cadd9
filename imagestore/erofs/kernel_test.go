package erofs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containers/storage/pkg/archive"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/imagestore/internal/torture"
)

// build writes an image of layers that are read at the same time, and returns its path.
func build(t *testing.T, layers ...[]byte) string {
	t.Helper()
	return finished(t, func(w *Writer) error {
		var g errgroup.Group
		read := make([]*Layer, len(layers))
		for i, layer := range layers {
			g.Go(func() (err error) {
				read[i], err = w.Read(t.Context(), bytes.NewReader(layer))
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		for _, l := range read {
			if err := w.Apply(t.Context(), l); err != nil {
				return err
			}
		}
		return nil
	})
}

// buildInTurn reads one after another.
func buildInTurn(t *testing.T, layers ...[]byte) string {
	t.Helper()
	return finished(t, func(w *Writer) error {
		for _, layer := range layers {
			if err := add(t.Context(), w, layer); err != nil {
				return err
			}
		}
		return nil
	})
}

func add(ctx context.Context, w *Writer, layer []byte) error {
	l, err := w.Read(ctx, bytes.NewReader(layer))
	if err != nil {
		return err
	}
	return w.Apply(ctx, l)
}

func finished(t *testing.T, fill func(*Writer) error) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.erofs")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewWriter(f, [16]byte{1, 2, 3}, Limits{})
	if err := fill(w); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	return path
}

// mount shows an image by the kernel's own EROFS.
func mount(t *testing.T, image string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

// file is all that a program can learn about a file.
type file struct {
	Mode, UID, GID, Links uint32
	Size                  int64
	Rdev                  uint64
	Mtime                 string
	Content               string // digest, or target
	Xattrs                string
	Group                 string // all names of this inode
}

// scan describes every file below root. Times of directories that no layer describes are left out.
func scan(t *testing.T, root string) map[string]file {
	t.Helper()
	files := map[string]file{}
	groups := map[uint64][]string{}
	inodes := map[string]uint64{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		f := file{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Links: uint32(st.Nlink), Size: st.Size, Rdev: st.Rdev,
			Mtime: fmt.Sprint(st.Mtim.Sec, ".", st.Mtim.Nsec), Xattrs: xattrsOf(t, path)}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f.Content = digestOf(t, path)
		case unix.S_IFLNK:
			f.Content, err = os.Readlink(path)
		case unix.S_IFDIR:
			f.Size = 0
			if name == "." || strings.HasPrefix(name, "implicit") {
				f.Mtime = "" // no layer says it, or not the last that changed it
			}
		}
		groups[st.Ino] = append(groups[st.Ino], name)
		inodes[name] = st.Ino
		files[name] = f
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range files {
		f.Group = strings.Join(groups[inodes[name]], "|")
		files[name] = f
	}
	return files
}

func xattrsOf(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatalf("list attributes of %s: %v", path, err)
	}
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	var all []string
	for _, name := range names {
		if name == "" {
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatalf("attribute %s of %s: %v", name, path, err)
		}
		all = append(all, fmt.Sprintf("%s=%x", name, sha256.Sum256(value[:n])))
	}
	return strings.Join(all, ",")
}

func digestOf(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatalf("read %s: %v", path, err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func compare(t *testing.T, got, want map[string]file) {
	t.Helper()
	bad := 0
	for name, w := range want {
		if g, ok := got[name]; !ok {
			t.Errorf("%.80q is missing", name)
			bad++
		} else if g != w {
			t.Errorf("%.80q differs:\n got %+v\nwant %+v", name, g, w)
			bad++
		}
		if bad > 10 {
			t.Fatal("and more")
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%.80q should not be there", name)
		}
	}
}

func TestTortureMatchesUnpack(t *testing.T) {
	layers, err := torture.Layers(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	plain := t.TempDir()
	for i, layer := range layers {
		if _, err := archive.UnpackLayer(plain, bytes.NewReader(layer), &archive.TarOptions{}); err != nil {
			t.Fatalf("unpack layer %d: %v", i, err)
		}
	}
	want := scan(t, plain)
	old := want["kinds/before-1970"] // the unpack has no times before 1970
	old.Mtime = "-1000.500000000"
	want["kinds/before-1970"] = old
	if len(want) < 13_000 {
		t.Fatalf("only %d entries", len(want))
	}
	for name, build := range map[string]func(*testing.T, ...[]byte) string{"at once": build, "in turn": buildInTurn} {
		t.Run(name, func(t *testing.T) {
			image := build(t, layers...)
			compare(t, scan(t, mount(t, image)), want)
			var st unix.Stat_t
			if err := unix.Stat(image, &st); err != nil {
				t.Fatal(err)
			}
			if st.Size%Align != 0 || st.Blocks*512 > 100<<20 {
				t.Errorf("image of %d bytes takes %d on the disk", st.Size, st.Blocks*512)
			}
			t.Logf("%d entries, %d bytes, %d on the disk", len(want), st.Size, st.Blocks*512)
			if out, err := exec.Command("fsck.erofs", image).CombinedOutput(); err != nil {
				t.Errorf("fsck.erofs: %v: %s", err, out)
			}
		})
	}
}

// TestFileBetweenRegions reads a layer while another one is within a large file, so that the file has no
// one extent.
func TestFileBetweenRegions(t *testing.T) {
	archived := func(name, content string) []byte {
		b := torture.NewTar()
		b.File(name, content)
		return b.Bytes()
	}
	large, other := torture.Noise(3<<20, 1), torture.Noise(1<<20, 2)
	lower := archived("large", large)
	image := finished(t, func(w *Writer) error {
		r, feed := io.Pipe()
		type result struct {
			l   *Layer
			err error
		}
		done := make(chan result, 1)
		go func() {
			l, err := w.Read(t.Context(), r)
			done <- result{l, err}
		}()
		if _, err := feed.Write(lower[:len(lower)/2]); err != nil {
			return err
		}
		upper, err := w.Read(t.Context(), bytes.NewReader(archived("other", other)))
		if err != nil {
			return err
		}
		if _, err := feed.Write(lower[len(lower)/2:]); err != nil {
			return err
		}
		first := <-done
		if first.err != nil {
			return first.err
		}
		if first.l.ops[0][0].inode.layout != layoutChunks {
			t.Error("the file is one extent")
		}
		return errors.Join(w.Apply(t.Context(), first.l), w.Apply(t.Context(), upper))
	})
	dir := mount(t, image)
	for name, want := range map[string]string{"large": large, "other": other} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("%s has other content", name)
		}
	}
}
