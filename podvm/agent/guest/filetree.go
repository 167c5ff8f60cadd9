package guest

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// pieces are what has come of a directory's new content, which is a list of files.
type pieces struct {
	want  map[string]bool // by path
	links []*agent.File   // made with the last piece
	count int             // of files
	size  int             // of their content, in bytes
}

func newPieces() *pieces { return &pieces{want: make(map[string]bool)} }

// sync makes a directory's content equal to the files of all pieces, of which this is one, in an order
// in which its readers never see a mixture: what "..data" will lead to is complete before "..data" is
// switched, and what it led to goes last. While there is more to come, no link is made and nothing goes.
func (p *pieces) sync(dir string, files []*agent.File, more bool) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	now, err := p.take(files)
	if err != nil {
		return err
	}
	if !more {
		now = append(now, p.links...)
	}
	t := tree{root, p.want}
	for _, f := range slices.SortedFunc(slices.Values(now), order) {
		if err := t.put(f); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	if more {
		return nil
	}
	return t.prune()
}

// take notes a piece's files and returns those that are no links.
func (p *pieces) take(files []*agent.File) ([]*agent.File, error) {
	var now []*agent.File
	for _, f := range files {
		if f.Path == "" {
			f.Path = "."
		}
		if !filepath.IsLocal(f.Path) || path.Clean(f.Path) != f.Path {
			return nil, fmt.Errorf("path %q leads out of its directory: %w", f.Path, errdefs.ErrInvalidArgument)
		}
		p.want[f.Path] = true
		p.count, p.size = p.count+1, p.size+len(f.Content)
		if f.Mode&unix.S_IFMT == unix.S_IFLNK {
			p.links = append(p.links, f)
		} else {
			now = append(now, f)
		}
	}
	if p.count > agent.FilesMax || p.size > agent.FilesSize {
		return nil, fmt.Errorf("more than %d files or %d bytes: %w", agent.FilesMax, agent.FilesSize, errdefs.ErrInvalidArgument)
	}
	return now, nil
}

// tree is a directory whose content becomes what is wanted.
type tree struct {
	root *os.Root
	want map[string]bool
}

// order sorts directories first, parents before children; then files; then links, those inside of
// folders first, and "..data" before the others, which lead through it.
func order(a, b *agent.File) int {
	rank := func(f *agent.File) int {
		switch {
		case f.Mode&unix.S_IFMT == unix.S_IFDIR:
			return 0
		case f.Mode&unix.S_IFMT != unix.S_IFLNK:
			return 1
		case strings.Contains(f.Path, "/"):
			return 2
		case f.Path == "..data":
			return 3
		}
		return 4
	}
	return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Path, b.Path))
}

func (t tree) put(f *agent.File) error {
	info, err := t.root.Lstat(f.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	isDir := f.Mode&unix.S_IFMT == unix.S_IFDIR
	if info != nil && info.IsDir() != isDir {
		if err := t.root.RemoveAll(f.Path); err != nil {
			return err
		}
		info = nil
	}
	if parent := path.Dir(f.Path); parent != "." {
		if err := t.root.MkdirAll(parent, 0o755); err != nil {
			return err
		}
	}
	switch f.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if info == nil {
			if err := t.root.Mkdir(f.Path, 0o700); err != nil {
				return err
			}
		}
		return t.own(f.Path, f)
	case unix.S_IFLNK:
		return t.link(f, info)
	case unix.S_IFREG, 0:
		return t.file(f, info)
	}
	return fmt.Errorf("mode %o: only files, folders and links: %w", f.Mode, errdefs.ErrInvalidArgument)
}

func (t tree) own(name string, f *agent.File) error {
	if err := t.root.Lchown(name, int(f.Uid), int(f.Gid)); err != nil {
		return err
	}
	return t.root.Chmod(name, permissions(f.Mode))
}

// temporary is the name under which a file is made that then replaces another.
func temporary(name string) string { return path.Join(path.Dir(name), "..caisson-new") }

func (t tree) link(f *agent.File, info fs.FileInfo) error {
	if info != nil && info.Mode()&fs.ModeSymlink != 0 {
		if target, err := t.root.Readlink(f.Path); err == nil && target == f.Target {
			return nil
		}
	}
	tmp := temporary(f.Path)
	if err := t.root.RemoveAll(tmp); err != nil {
		return err
	}
	if err := t.root.Symlink(f.Target, tmp); err != nil {
		return err
	}
	if err := t.root.Lchown(tmp, int(f.Uid), int(f.Gid)); err != nil {
		return err
	}
	return t.root.Rename(tmp, f.Path)
}

func (t tree) file(f *agent.File, info fs.FileInfo) error {
	if info != nil && info.Mode().IsRegular() && info.Size() == int64(len(f.Content)) && t.holds(f) {
		return t.own(f.Path, f)
	}
	tmp := temporary(f.Path)
	if err := t.root.RemoveAll(tmp); err != nil {
		return err
	}
	if err := t.root.WriteFile(tmp, f.Content, 0o600); err != nil {
		return err
	}
	if err := t.own(tmp, f); err != nil {
		return err
	}
	return t.root.Rename(tmp, f.Path)
}

// holds tells whether a file has the content already. A container that may write here may put a pipe
// or a huge file in its place: neither is waited for, nor read whole.
func (t tree) holds(f *agent.File) bool {
	old, err := t.root.OpenFile(f.Path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer old.Close()
	content, err := io.ReadAll(io.LimitReader(old, int64(len(f.Content))+1))
	return err == nil && bytes.Equal(content, f.Content)
}

// prune removes what is not wanted. A folder is wanted for what is in it, too.
func (t tree) prune() error {
	keep := make(map[string]bool)
	for name := range t.want {
		for ; name != "."; name = path.Dir(name) {
			keep[name] = true
		}
	}
	var gone []string
	err := fs.WalkDir(t.root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || name == "." || keep[name] {
			return err
		}
		gone = append(gone, name)
		if e.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range gone {
		if err := t.root.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}
