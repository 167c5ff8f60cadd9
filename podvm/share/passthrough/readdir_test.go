package passthrough

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// TestReadDirWhileItChanges lists 5,000 entries that stay, each once, while others come and go.
func TestReadDirWhileItChanges(t *testing.T) {
	mnt, host := mounted(t)
	const stay = 5000
	for i := range stay {
		ok(t, os.WriteFile(fmt.Sprintf("%s/stay-%d", host, i), nil, 0o600))
	}
	stop := make(chan struct{})
	var others sync.WaitGroup
	for n, dir := range []string{mnt, host} {
		others.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				name := fmt.Sprintf("%s/goes-%d-%d", dir, n, i%300)
				if i/300%2 == 0 {
					os.WriteFile(name, nil, 0o600)
				} else {
					os.Remove(name)
				}
			}
		})
	}
	for range 5 {
		times := make(map[string]int)
		for _, e := range must(os.ReadDir(mnt))(t) {
			times[e.Name()]++
		}
		for i := range stay {
			if name := fmt.Sprintf("stay-%d", i); times[name] != 1 {
				t.Errorf("%s is listed %d times", name, times[name])
			}
		}
	}
	close(stop)
	others.Wait()
}

// TestReadDirInPieces lists by answers of many sizes, with and without room to keep what did not
// fit, and counts lookups.
func TestReadDirInPieces(t *testing.T) {
	host := t.TempDir()
	const entries = 700
	for i := range entries {
		ok(t, os.WriteFile(fmt.Sprintf("%s/%0*d", host, 1+i%100, i), nil, 0o600))
	}
	f := serveDir(t, host)
	for _, plus := range []bool{false, true} {
		for _, size := range []uint32{600, 1000, 4096, 128 << 10} {
			for _, full := range []int64{0, maxKept} {
				f.kept.size.Add(full)
				fh := openDir(t, f, fuse.FUSE_ROOT_ID)
				// Twice, from the begin.
				for range 2 {
					listed(t, f, fh, plus, size, entries)
				}
				f.ReleaseDir(&fuse.ReleaseIn{Fh: fh})
				f.kept.size.Add(-full)
			}
		}
	}
}

// listed reads the whole directory, which has to have so many files, and forgets them.
func listed(t *testing.T, f *FS, fh uint64, plus bool, size uint32, files int) {
	t.Helper()
	names := make(map[string]int)
	for at := uint64(0); ; {
		got, outs := readDir(t, f, fh, plus, size, at)
		if len(got) == 0 {
			break
		}
		for i, e := range got {
			names[e.Name]++
			at = e.Off
			if plus && dots(e.Name) != (outs[i].NodeId == 0) {
				t.Errorf("%s has the node %d", e.Name, outs[i].NodeId)
			}
		}
		if plus {
			forgetAll(t, f, outs)
		}
	}
	for name, n := range names {
		if n != 1 {
			t.Errorf("plus %v, size %d: %q is there %d times", plus, size, name, n)
		}
	}
	if len(names) != files+2 {
		t.Errorf("plus %v, size %d: %d names; want %d", plus, size, len(names), files+2)
	}
}

// forgetAll takes back exactly what was delivered: then nothing but the root may be left.
func forgetAll(t *testing.T, f *FS, outs []fuse.EntryOut) {
	t.Helper()
	for _, out := range outs {
		if out.NodeId == 0 {
			continue
		}
		f.nodes.mu.Lock()
		n := f.nodes.byID[out.NodeId]
		f.nodes.mu.Unlock()
		if n == nil || n.lookups != 1 {
			t.Fatalf("node %d is %+v", out.NodeId, n)
		}
		f.Forget(out.NodeId, 1)
	}
	if n := len(f.nodes.byID); n != 1 {
		t.Fatalf("%d nodes are left", n)
	}
}

func openDir(t testing.TB, f *FS, node uint64) uint64 {
	t.Helper()
	var out fuse.OpenOut
	if code := f.OpenDir(nil, &fuse.OpenIn{InHeader: fuse.InHeader{NodeId: node}}, &out); !code.Ok() {
		t.Fatal(code)
	}
	return out.Fh
}

func readDir(t testing.TB, f *FS, fh uint64, plus bool, size uint32, at uint64) ([]fuse.DirEntry, []fuse.EntryOut) {
	t.Helper()
	in := &fuse.ReadIn{Fh: fh, Offset: at, Size: size}
	list := fuse.NewDirEntryList(make([]byte, size), at)
	if !plus {
		if code := f.ReadDir(nil, in, list); !code.Ok() {
			t.Fatal(code)
		}
		return must(fuse.ParseDirEntries(list.Bytes()))(t), nil
	}
	if code := f.ReadDirPlus(nil, in, list); !code.Ok() {
		t.Fatal(code)
	}
	got, outs, err := fuse.ParseDirLookupEntries(list.Bytes())
	ok(t, err)
	return got, outs
}

// TestVanished has entries go between the list and their lookup.
func TestVanished(t *testing.T) {
	host := t.TempDir()
	for i := range 40 {
		ok(t, os.WriteFile(fmt.Sprintf("%s/%d", host, i), nil, 0o600))
	}
	f := serveDir(t, host)
	fh := openDir(t, f, fuse.FUSE_ROOT_ID)
	// The rest of the first is kept.
	first, outs := readDir(t, f, fh, true, 600, 0)
	forgetAll(t, f, outs)
	for i := range 40 {
		ok(t, os.Remove(fmt.Sprintf("%s/%d", host, i)))
	}
	got, outs := readDir(t, f, fh, true, 64<<10, first[len(first)-1].Off)
	for i, out := range outs {
		if out.NodeId != 0 {
			t.Errorf("%s, which is gone, is node %d", got[i].Name, out.NodeId)
		}
	}
	// An offset that is none must not lose the place.
	var list = fuse.NewDirEntryList(make([]byte, 600), 0)
	f.ReadDir(nil, &fuse.ReadIn{Fh: fh, Offset: 1<<63 | 1, Size: 600}, list)
	if n := len(f.nodes.byID); n != 1 {
		t.Errorf("%d nodes are left", n)
	}
}

// TestParentOfRoot has the share's root be its own parent.
func TestParentOfRoot(t *testing.T) {
	host := t.TempDir()
	f := serveDir(t, host)
	fh := openDir(t, f, fuse.FUSE_ROOT_ID)
	var st unix.Stat_t
	ok(t, unix.Stat(host, &st))
	got, _ := readDir(t, f, fh, false, 4096, 0)
	for _, e := range got {
		if e.Ino != st.Ino {
			t.Errorf("%q is the inode %d; want %d", e.Name, e.Ino, st.Ino)
		}
	}
}
