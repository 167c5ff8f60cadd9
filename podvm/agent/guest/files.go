package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// fileSets are directories and files that the host keeps in step with its own.
type fileSets struct {
	dir string
	// turn holds a token: who has it may change files.
	turn chan struct{}

	mu   sync.Mutex
	sets map[string]fileSet
}

type fileSet struct {
	path   string
	single bool
}

func newFileSets(dir string) *fileSets {
	f := &fileSets{dir: dir, turn: make(chan struct{}, 1), sets: make(map[string]fileSet)}
	f.turn <- struct{}{}
	return f
}

// hashed makes a file's name of any name.
func hashed(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:16])
}

func (f *fileSets) lookup(name string) (fileSet, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, ok := f.sets[name]
	return s, ok
}

// put makes the set's content what the request says and returns where it is. A known set without
// files in the request stays as it is.
func (f *fileSets) put(ctx context.Context, req *agent.Files) (string, error) {
	select {
	case <-f.turn:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { f.turn <- struct{}{} }()
	s, known := f.lookup(req.Name)
	switch {
	case req.Name == "":
		return "", fmt.Errorf("files without a name: %w", errdefs.ErrInvalidArgument)
	case known && s.single != req.Single:
		return "", fmt.Errorf("files %q: single file or directory, not both: %w", req.Name, errdefs.ErrInvalidArgument)
	case known && len(req.Files) == 0:
		return s.path, nil
	case !known:
		s = fileSet{filepath.Join(f.dir, hashed(req.Name)), req.Single}
	}
	if err := s.write(req.Files); err != nil {
		return "", fmt.Errorf("files %q: %w", req.Name, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sets[req.Name] = s
	return s.path, nil
}

// update replaces the content of a set that containers have mounted already.
func (f *fileSets) update(ctx context.Context, req *agent.Files) error {
	if _, ok := f.lookup(req.GetName()); !ok {
		return fmt.Errorf("no files %q in this pod: %w", req.GetName(), errdefs.ErrNotFound)
	}
	_, err := f.put(ctx, req)
	return err
}

func (s fileSet) write(files []*agent.File) error {
	if !s.single {
		if err := os.MkdirAll(s.path, 0o755); err != nil {
			return err
		}
		return syncTree(s.path, files)
	}
	switch len(files) {
	case 0:
		return writeInPlace(s.path, &agent.File{Mode: 0o644})
	case 1:
		return writeInPlace(s.path, files[0])
	}
	return fmt.Errorf("%d files in place of one: %w", len(files), errdefs.ErrInvalidArgument)
}

// writeInPlace keeps the inode, which is what containers have mounted.
func writeInPlace(path string, file *agent.File) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(file.Content); err != nil {
		return err
	}
	if err := f.Chown(int(file.Uid), int(file.Gid)); err != nil {
		return err
	}
	return f.Chmod(permissions(file.Mode))
}

// permissions turns a st_mode's into Go's.
func permissions(mode uint32) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, flag := range map[uint32]os.FileMode{unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky} {
		if mode&bit != 0 {
			m |= flag
		}
	}
	return m
}
