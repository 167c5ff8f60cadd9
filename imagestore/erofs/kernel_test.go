package erofs

import (
	"bytes"
	"context"
	"crypto/sha256"
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
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/imagestore/internal/torture"
)

// build writes an image of layers and returns its path.
func build(t *testing.T, layers ...[]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.erofs")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewWriter(f, [16]byte{1, 2, 3}, Limits{})
	for i, layer := range layers {
		if err := w.AddLayer(context.Background(), bytes.NewReader(layer)); err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
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
	image := build(t, layers...)
	got, want := scan(t, mount(t, image)), scan(t, plain)
	old := want["kinds/before-1970"] // the unpack has no times before 1970
	old.Mtime = "-1000.500000000"
	want["kinds/before-1970"] = old
	if len(want) < 13_000 {
		t.Fatalf("only %d entries", len(want))
	}
	compare(t, got, want)
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
}
