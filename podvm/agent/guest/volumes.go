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
	byName map[string]volume
}

type volume struct {
	name, dir string
	memory    bool
	project   uint32 // that counts it
}

func newVolumes(dir string) *volumes {
	v := &volumes{dir: dir, turn: make(chan struct{}, 1), byName: make(map[string]volume)}
	v.turn <- struct{}{}
	return v
}

func (v *volumes) lookup(name string) (volume, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	d, ok := v.byName[name]
	return d, ok
}

func (v *volumes) all() []volume {
	v.mu.Lock()
	defer v.mu.Unlock()
	var all []volume
	for _, d := range v.byName {
		all = append(all, d)
	}
	return all
}

// use returns the directory of an emptyDir, making it on first use, on scratch or in memory.
func (v *volumes) use(ctx context.Context, e *agent.EmptyDir, scratch string, q *quotas) (string, error) {
	if e.Name == "" {
		return "", fmt.Errorf("emptyDir without a name: %w", errdefs.ErrInvalidArgument)
	}
	select {
	case <-v.turn:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { v.turn <- struct{}{} }()
	if d, ok := v.lookup(e.Name); ok {
		return d.dir, nil
	}
	d := volume{name: e.Name, dir: filepath.Join(scratch, "volumes", hashed(e.Name)), memory: e.Memory}
	if e.Memory {
		d.dir = filepath.Join(v.dir, hashed(e.Name))
	}
	if err := makeVolume(d, e); err != nil {
		return "", fmt.Errorf("emptyDir %s: %w", e.Name, err)
	}
	if !e.Memory {
		var err error
		if d.project, err = q.begin(d.dir); err != nil {
			return "", fmt.Errorf("emptyDir %s: %w", e.Name, err)
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.byName[e.Name] = d
	return d.dir, nil
}

func makeVolume(d volume, e *agent.EmptyDir) error {
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return err
	}
	if d.memory {
		// 0 is no cap in tmpfs's own words, too: the pod's memory is one.
		if err := unix.Mount("tmpfs", d.dir, "tmpfs", 0, fmt.Sprintf("size=%d,nr_inodes=0", e.Size)); err != nil {
			return err
		}
	}
	mode := e.Mode
	if mode == 0 {
		mode = 0o777
	}
	if err := os.Chown(d.dir, 0, int(e.Gid)); err != nil {
		return err
	}
	return os.Chmod(d.dir, permissions(mode))
}
