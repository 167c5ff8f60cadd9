package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
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

	// coming are sets whose last piece is not there yet. Only the token's holder looks at them.
	coming map[string]*pieces

	mu   sync.Mutex
	sets map[string]fileSet
}

type fileSet struct {
	path   string
	single bool
	// synced is the digest of a single file as the host has it; nil before it was written.
	synced []byte
}

func newFileSets(dir string) *fileSets {
	f := &fileSets{dir: dir, turn: make(chan struct{}, 1), coming: make(map[string]*pieces), sets: make(map[string]fileSet)}
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
// files in the request stays as it is; a piece that is not the last makes no set yet.
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
	case len(req.Files) == 0:
		return "", fmt.Errorf("no files %q in this pod: %w", req.Name, errdefs.ErrNotFound)
	case !known:
		s = fileSet{path: filepath.Join(f.dir, hashed(req.Name)), single: req.Single}
	}
	if err := f.write(&s, req); err != nil {
		return "", fmt.Errorf("files %q: %w", req.Name, err)
	}
	if req.More {
		return s.path, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sets[req.Name] = s
	return s.path, nil
}

// write brings what the request has of the set. The caller has the token.
func (f *fileSets) write(s *fileSet, req *agent.Files) error {
	p := f.coming[req.Name]
	delete(f.coming, req.Name)
	if s.single {
		if len(req.Files) != 1 || req.More || req.Before > 0 {
			return fmt.Errorf("%d files in place of one: %w", len(req.Files), errdefs.ErrInvalidArgument)
		}
		return s.writeOne(req.Files[0])
	}
	if req.Before == 0 {
		p = newPieces()
	}
	if p == nil || p.count != int(req.Before) {
		return fmt.Errorf("a piece that does not follow the one before; begin anew: %w", errdefs.ErrFailedPrecondition)
	}
	if err := os.MkdirAll(s.path, 0o755); err != nil {
		return err
	}
	if err := p.sync(s.path, req.Files, req.More); err != nil {
		return err
	}
	if req.More {
		f.coming[req.Name] = p
	}
	return nil
}

// writeOne makes a single file the host's, unless a container has written it: that is not on the host
// yet, and would be lost.
func (s *fileSet) writeOne(file *agent.File) error {
	if s.synced != nil {
		content, err := s.read()
		if err != nil || !s.isSynced(content) {
			return err
		}
	}
	if err := writeInPlace(s.path, file); err != nil {
		return err
	}
	s.synced = digest(file.Content)
	return nil
}

func (s *fileSet) isSynced(content []byte) bool { return bytes.Equal(digest(content), s.synced) }

func digest(content []byte) []byte {
	sum := sha256.Sum256(content)
	return sum[:]
}

// read returns the content of a single file. If it is longer than what can be sent back, it is cut, to
// one byte more than that.
func (s *fileSet) read() ([]byte, error) {
	f, err := os.Open(s.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, agent.WrittenMax+1))
}

// written returns what containers made of a single file; nil if it is as the host has it. There is
// room for so many bytes.
func (f *fileSets) written(name string, room int) (*agent.WrittenFile, error) {
	<-f.turn
	defer func() { f.turn <- struct{}{} }()
	s, ok := f.lookup(name)
	if !ok {
		return nil, nil
	}
	content, err := s.read()
	if err != nil || s.isSynced(content) {
		return nil, err
	}
	if len(content) > room {
		return nil, fmt.Errorf("an end takes %d bytes of all files", agent.WrittenAll)
	}
	if len(content) <= agent.WrittenMax { // else the host keeps its own
		s.synced = digest(content)
		f.mu.Lock()
		f.sets[name] = s
		f.mu.Unlock()
	}
	return &agent.WrittenFile{Name: name, Content: content}, nil
}

// writeInPlace keeps the inode, which is what containers have mounted, and shows none of them an empty
// file meanwhile.
func writeInPlace(path string, file *agent.File) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(file.Content, 0); err != nil {
		return err
	}
	if err := f.Truncate(int64(len(file.Content))); err != nil {
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
