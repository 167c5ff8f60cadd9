package passthrough

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// mountBelow mounts a tmpfs with files in a new directory of the host's.
func mountBelow(t *testing.T, dir string) {
	t.Helper()
	ok(t, os.Mkdir(dir, 0o755))
	ok(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	ok(t, unix.Mount("", dir, "", unix.MS_PRIVATE, ""))
	ok(t, os.MkdirAll(dir+"/a/b", 0o755))
	ok(t, os.WriteFile(dir+"/a/file", nil, 0o600))
	ok(t, os.WriteFile(dir+"/a/b/file", nil, 0o600))
}

// TestCrossingsForgotten has the host unmount a file system of which a guest had files.
func TestCrossingsForgotten(t *testing.T) {
	mnt, host, f, server := mountedFS(t)
	below := host + "/below"
	mountBelow(t, below)
	ok(t, os.WriteFile(host+"/file", nil, 0o600))
	notify := func() {
		t.Helper()
		for _, c := range f.Crossings() {
			if code := server.EntryNotify(c.Parent, c.Name); !code.Ok() {
				t.Fatalf("the entry %v: %v", c, code)
			}
		}
	}
	busy := func() {
		t.Helper()
		if err := unix.Unmount(below, unix.UMOUNT_NOFOLLOW); !errors.Is(err, unix.EBUSY) {
			t.Fatalf("unmount of what the guest knows: %v", err)
		}
	}
	lstat(t, mnt+"/file")
	lstat(t, mnt+"/below/a/b/file")
	must(os.ReadDir(mnt + "/below/a"))(t)
	busy()
	// What is open stays known, and its directories.
	open := must(os.Open(mnt + "/below/a/file"))(t)
	notify()
	f.knowsBelow(t, 3)
	busy()
	open.Close()
	// Only a directory that was looked up again has a name to tell.
	lstat(t, mnt+"/below")
	notify()
	f.knowsBelow(t, 0)
	if left := f.Crossings(); len(left) != 0 {
		t.Errorf("the crossings %v are left", left)
	}
	ok(t, unix.Unmount(below, unix.UMOUNT_NOFOLLOW))
	lstat(t, mnt+"/below") // now the directory below
}

// knowsBelow waits until the guest knows no more than so many nodes of other mounts: its kernel sends
// forgets some time later, of which there is no event.
func (f *FS) knowsBelow(t *testing.T, most int) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); f.nodesBelow() > most; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it knows %d nodes; want %d", f.nodesBelow(), most)
		}
	}
}

// nodesBelow counts the nodes of other mounts than the directory's.
func (f *FS) nodesBelow() (n int) {
	f.nodes.mu.Lock()
	defer f.nodes.mu.Unlock()
	root := f.nodes.byID[fuse.FUSE_ROOT_ID]
	for _, node := range f.nodes.byID {
		if node.ident.mount != root.ident.mount {
			n++
		}
	}
	return n
}

// TestCrossings has a mount's root known by a lookup and by a list.
func TestCrossings(t *testing.T) {
	_, host := hostileDirs(t)
	mountBelow(t, host+"/below")
	f := serveDir(t, host)
	g := newGuest(t, f)
	want := []Crossing{{fuse.FUSE_ROOT_ID, "below"}}
	looked := map[string]func() uint64{
		"lookup": func() uint64 { id, _ := g.lookup(fuse.FUSE_ROOT_ID, "below"); return id },
		"list": func() (id uint64) {
			fh := openDir(t, f, fuse.FUSE_ROOT_ID)
			defer f.ReleaseDir(&fuse.ReleaseIn{Fh: fh})
			names, outs := readDir(t, f, fh, true, 64<<10, 0)
			for i, e := range names {
				if e.Name == "below" {
					id = outs[i].NodeId
				}
			}
			return id
		},
	}
	for by, look := range looked {
		g.lookup(fuse.FUSE_ROOT_ID, "inside")
		id := look()
		dir, _ := g.lookup(id, "a")
		g.lookup(dir, "file")
		if got := f.Crossings(); !slices.Equal(got, want) {
			t.Errorf("by a %s: %v; want %v", by, got, want)
		}
		look()
		f.Forget(id, 1)
		if got := f.Crossings(); !slices.Equal(got, want) {
			t.Errorf("after one forget of two: %v; want %v", got, want)
		}
		f.Forget(id, 1)
		if got := f.Crossings(); len(got) != 0 {
			t.Errorf("after the last forget: %v", got)
		}
	}
	id := looked["lookup"]()
	f.nodes.mu.Lock()
	for i := range maxCrossings {
		f.nodes.crossed(Crossing{77, fmt.Sprint(i)}, f.nodes.byID[id])
	}
	f.nodes.mu.Unlock()
	if n := len(f.Crossings()); n != maxCrossings {
		t.Errorf("%d crossings are kept", n)
	}
	f.Forget(id, 1)
	if n := len(f.Crossings()); n != 0 {
		t.Errorf("%d crossings of a node that is not known", n)
	}
}
