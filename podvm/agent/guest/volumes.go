package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// volumes are the pod's emptyDirs, which live as long as the pod.
type volumes struct {
	// dir is where those in memory are mounted.
	dir  string
	turn chan struct{}

	mu     sync.Mutex
	byName map[string]string // their directories
}

func newVolumes(dir string) *volumes {
	v := &volumes{dir: dir, turn: make(chan struct{}, 1), byName: make(map[string]string)}
	v.turn <- struct{}{}
	return v
}

func (v *volumes) lookup(name string) (dir string, ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	dir, ok = v.byName[name]
	return dir, ok
}

// use returns the directory of an emptyDir, making it on first use, on scratch or in memory.
func (v *volumes) use(ctx context.Context, e *agent.EmptyDir, scratch string) (string, error) {
	if e.Name == "" {
		return "", fmt.Errorf("emptyDir without a name: %w", errdefs.ErrInvalidArgument)
	}
	select {
	case <-v.turn:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { v.turn <- struct{}{} }()
	if dir, ok := v.lookup(e.Name); ok {
		return dir, nil
	}
	dir := filepath.Join(scratch, "volumes", hashed(e.Name))
	if e.Memory {
		dir = filepath.Join(v.dir, hashed(e.Name))
	}
	if err := makeVolume(dir, e); err != nil {
		return "", fmt.Errorf("emptyDir %s: %w", e.Name, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.byName[e.Name] = dir
	return dir, nil
}

func makeVolume(dir string, e *agent.EmptyDir) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if e.Memory {
		// 0 is no cap in tmpfs's own words, too: the pod's memory is one.
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,nr_inodes=0", e.Size)); err != nil {
			return err
		}
	}
	mode := e.Mode
	if mode == 0 {
		mode = 0o777
	}
	if err := os.Chown(dir, 0, int(e.Gid)); err != nil {
		return err
	}
	return os.Chmod(dir, permissions(mode))
}
