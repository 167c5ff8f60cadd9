package server

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// disk mounts a file system of some size.
func disk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestNeeds(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(file, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	frozen := disk(t, "64m")
	if err := unix.Mount("", frozen, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	whole := Needs{Root: disk(t, "64m"), Programs: []Need{{file, "install it"}, {"sh", "install it"}}, Files: []Need{{file, "build it"}}}
	for name, c := range map[string]struct {
		change func(n *Needs)
		says   []string
	}{
		"all there":   {func(*Needs) {}, nil},
		"no program":  {func(n *Needs) { n.Programs = []Need{{"no-such-vmm", "install it"}} }, []string{"no-such-vmm", "install it"}},
		"no path":     {func(n *Needs) { n.Programs = []Need{{"/no/such/vmm", "install it"}} }, []string{"/no/such/vmm", "install it"}},
		"no file":     {func(n *Needs) { n.Files = []Need{{"/no/kernel", "build it"}} }, []string{"/no/kernel", "build it"}},
		"device":      {func(n *Needs) { n.Devices = []Need{{"/dev/null", "load it"}} }, nil},
		"no device":   {func(n *Needs) { n.Devices = []Need{{"/dev/no-kvm", "load it"}} }, []string{"/dev/no-kvm", "load it"}},
		"no root":     {func(n *Needs) { n.Root = "/no/root" }, []string{"/no/root"}},
		"read-only":   {func(n *Needs) { n.Root = frozen }, []string{frozen, "read-only", "remount"}},
		"full":        {func(n *Needs) { n.Root = disk(t, "1m") }, []string{"KiB free", "remove images"}},
		"two at once": {func(n *Needs) { n.Root, n.Files = frozen, []Need{{"/no/kernel", "build it"}} }, []string{frozen, "/no/kernel"}},
	} {
		n := whole
		c.change(&n)
		err := Ready(n)(t.Context())
		if (err == nil) != (c.says == nil) {
			t.Errorf("%s: got %v", name, err)
			continue
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: %v does not say %q", name, err, s)
			}
		}
	}
	d := start(t, func(o *Options) { whole.Root = "/no/root"; o.Runtime = Ready(whole) })
	r := must(cri.NewRuntimeServiceClient(d.conn).Status(t.Context(), &cri.StatusRequest{}))(t)
	if c := r.GetStatus().GetConditions()[0]; c.GetType() != "RuntimeReady" || c.GetStatus() || c.GetReason() == "" || !strings.Contains(c.GetMessage(), "/no/root") {
		t.Errorf("got %v", c)
	}
}

// TestReadinessHangs: looks are kept for a while, are one at a time, and keep nobody waiting.
func TestReadinessHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var looks atomic.Int32
		hang := make(chan error)
		answer := errors.New("full")
		r := &readiness{look: func() error { looks.Add(1); return answer }}
		for range 3 {
			if err := r.check(t.Context()); err != answer || looks.Load() != 1 {
				t.Errorf("got %v after %d looks", err, looks.Load())
			}
		}
		time.Sleep(readyFor)
		r.look = func() error { looks.Add(1); return <-hang }
		for range 2 {
			began := time.Now()
			if err := r.check(t.Context()); err == nil || !strings.Contains(err.Error(), "has not answered") || time.Since(began) != readyLook || looks.Load() != 2 {
				t.Errorf("got %v after %v and %d looks", err, time.Since(began), looks.Load())
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.check(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		hang <- nil
		synctest.Wait()
		if err := r.check(t.Context()); err != nil || looks.Load() != 2 {
			t.Errorf("got %v after %d looks", err, looks.Load())
		}
	})
}
