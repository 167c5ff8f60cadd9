package erofs

import (
	"archive/tar"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/imagestore/internal/torture"
)

// model is a plain unpack into a directory, confined by the kernel (openat2). It takes whiteouts
// before a layer's other entries, as the specification means them, and nothing that two unpacks
// could see differently.
type model struct {
	t    *testing.T
	root string
	fd   int
}

func newModel(t *testing.T) *model {
	m := &model{t: t, root: t.TempDir()}
	if err := os.Chmod(m.root, 0o755); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(m.root, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	m.fd = fd
	t.Cleanup(func() { unix.Close(fd) })
	return m
}

// dir returns the real path of a directory of the image, which it makes if it has to. If that is
// not possible, it makes nothing.
func (m *model) dir(name string, make bool) (string, bool) {
	at, missing := ".", false
	for part := range strings.SplitSeq(name, "/") {
		at = path.Join(at, part)
		if missing {
			continue
		}
		fd, err := unix.Openat2(m.fd, at, &unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_IN_ROOT})
		if err != nil {
			_, there := os.Lstat(filepath.Join(m.root, at))
			if missing = os.IsNotExist(there); !missing || !make {
				return "", false // a file, a dangling symlink, or nothing
			}
			continue
		}
		at = m.real(fd)
		if info, err := os.Lstat(filepath.Join(m.root, at)); err != nil || !info.IsDir() {
			return "", false
		}
	}
	if missing {
		if err := os.MkdirAll(filepath.Join(m.root, at), 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	return at, true
}

func (m *model) real(fd int) string {
	defer unix.Close(fd)
	full, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		m.t.Fatal(err)
	}
	rel, err := filepath.Rel(m.root, full)
	if err != nil {
		m.t.Fatal(err)
	}
	return rel
}

// apply unpacks an entry and tells whether it could.
func (m *model) apply(hdr tar.Header, content string) bool {
	targetDir, ok := m.dir(path.Dir(hdr.Linkname), false)
	target := filepath.Join(m.root, targetDir, path.Base(hdr.Linkname))
	if hdr.Typeflag == tar.TypeLink {
		if info, err := os.Lstat(target); !ok || err != nil || info.IsDir() {
			return false
		}
	}
	dir, ok := m.dir(path.Dir(hdr.Name), true)
	if !ok {
		return false
	}
	to := filepath.Join(m.root, dir, path.Base(hdr.Name))
	old, err := os.Lstat(to)
	if hdr.Typeflag == tar.TypeLink {
		if sameInode(target, to) {
			return true
		}
		if strings.HasPrefix(target, to+"/") {
			return false
		}
		os.RemoveAll(to)
		return os.Link(target, to) == nil
	}
	if hdr.Typeflag == tar.TypeDir && err == nil && old.IsDir() {
		return os.Chmod(to, os.FileMode(hdr.Mode)) == nil
	}
	os.RemoveAll(to)
	switch hdr.Typeflag {
	case tar.TypeDir:
		return os.Mkdir(to, 0o700) == nil && os.Chmod(to, os.FileMode(hdr.Mode)) == nil
	case tar.TypeSymlink:
		return os.Symlink(hdr.Linkname, to) == nil
	}
	return os.WriteFile(to, []byte(content), 0o600) == nil && os.Chmod(to, os.FileMode(hdr.Mode)) == nil
}

func (m *model) hasSymlink(dir string) bool {
	found := false
	err := filepath.WalkDir(filepath.Join(m.root, dir), func(_ string, d fs.DirEntry, err error) error {
		found = found || d.Type() == fs.ModeSymlink
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return found
}

func sameInode(a, b string) bool {
	first, err := os.Lstat(a)
	second, err2 := os.Lstat(b)
	return err == nil && err2 == nil && os.SameFile(first, second)
}

type step struct {
	hdr     tar.Header
	content string
}

func pick(r *rand.Rand) string {
	name := string("abcd"[r.IntN(4)])
	for r.IntN(3) > 0 && len(name) < 7 {
		name += "/" + string("abcd"[r.IntN(4)])
	}
	return name
}

// layer makes up a layer that the model can unpack, and unpacks it.
func (m *model) layer(r *rand.Rand) []step {
	var whiteouts, steps []step
	first := false // whiteouts must come before the rest
	for range r.IntN(4) {
		name := pick(r)
		dir, ok := m.dir(path.Dir(name), false)
		if !ok {
			continue
		}
		hidden := path.Join(dir, ".wh."+path.Base(name))
		first = first || m.hasSymlink(dir)
		if r.IntN(3) == 0 {
			hidden = path.Join(dir, ".wh..wh..opq")
			entries, err := os.ReadDir(filepath.Join(m.root, dir))
			if err != nil {
				m.t.Fatal(err)
			}
			for _, e := range entries {
				os.RemoveAll(filepath.Join(m.root, dir, e.Name()))
			}
		}
		os.RemoveAll(filepath.Join(m.root, dir, path.Base(name)))
		whiteouts = append(whiteouts, step{hdr: tar.Header{Name: hidden}})
	}
	for n := range 2 + r.IntN(10) {
		s := step{hdr: tar.Header{Name: pick(r), Mode: 0o600 + int64(r.IntN(64)), Typeflag: tar.TypeReg}}
		switch r.IntN(8) {
		case 0, 1, 2:
			s.hdr.Typeflag, s.hdr.Mode = tar.TypeDir, 0o700+int64(r.IntN(64))
		case 3:
			s.hdr.Typeflag, s.hdr.Linkname = tar.TypeSymlink, []string{"../", "/", ""}[r.IntN(3)]+pick(r)
		case 4:
			s.hdr.Typeflag, s.hdr.Linkname = tar.TypeLink, pick(r)
		default:
			s.content = fmt.Sprint("content ", n)
		}
		if m.apply(s.hdr, s.content) {
			steps = append(steps, s)
		}
	}
	// Wherever whiteouts stand in the archive, they mean the same, as long as their directories
	// are still found by these names, and no entry before them goes through a symlink they hide.
	for _, w := range whiteouts {
		at := 0
		if dir, ok := m.dir(path.Dir(w.hdr.Name), false); ok && !first && dir == path.Dir(w.hdr.Name) && !replaces(steps, dir) {
			at = r.IntN(len(steps) + 1)
		}
		steps = append(steps[:at], append([]step{w}, steps[at:]...)...)
	}
	return steps
}

// replaces tells whether any of the steps may have put something else in place of a part of dir.
func replaces(steps []step, dir string) bool {
	for _, s := range steps {
		if s.hdr.Typeflag != tar.TypeDir || s.hdr.Linkname != "" {
			if strings.HasPrefix(dir+"/", s.hdr.Name+"/") {
				return true
			}
		}
		if s.hdr.Typeflag == tar.TypeSymlink || s.hdr.Typeflag == tar.TypeLink {
			return true
		}
	}
	return false
}

// TestRandomLayersMatchUnpack compares many small images with the model.
func TestRandomLayersMatchUnpack(t *testing.T) {
	for seed := range uint64(120) {
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 7))
			m := newModel(t)
			var layers [][]byte
			var story []string
			defer func() {
				if t.Failed() {
					t.Log(strings.Join(story, "\n"))
				}
			}()
			for l := range 2 + r.IntN(4) {
				archive := torture.NewTar()
				for _, s := range m.layer(r) {
					archive.Add(s.hdr, s.content)
					story = append(story, fmt.Sprintf("layer %d: %c %s %s %s", l, max(s.hdr.Typeflag, '0'), s.hdr.Name, s.hdr.Linkname, s.content))
				}
				layers = append(layers, archive.Bytes())
			}
			build := build
			if seed%2 == 0 {
				build = buildInTurn
			}
			got, want := withoutTimes(scan(t, mount(t, build(t, layers...)))), withoutTimes(scan(t, m.root))
			compare(t, got, want)
		})
		if !ok {
			return
		}
	}
}

func withoutTimes(files map[string]file) map[string]file {
	for name, f := range files {
		f.Mtime = ""
		files[name] = f
	}
	return files
}
