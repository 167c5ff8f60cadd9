package passthrough

import (
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const secret = "what no guest may read"

// hostileDirs are a directory with a secret, and the one below it that is shared.
func hostileDirs(t testing.TB) (outside, share string) {
	t.Helper()
	outside = t.TempDir()
	share = outside + "/share"
	ok(t, os.WriteFile(outside+"/secret", []byte(secret), 0o600))
	ok(t, os.Mkdir(share, 0o755))
	ok(t, os.WriteFile(share+"/inside", []byte("inside"), 0o600))
	return outside, share
}

// unchanged checks what is beside the share.
func unchanged(t testing.TB, outside string) {
	t.Helper()
	entries := must(os.ReadDir(outside))(t)
	if len(entries) != 2 || entries[0].Name() != "secret" || entries[1].Name() != "share" {
		t.Errorf("outside is %v", entries)
	}
	content(t, outside+"/secret", secret)
	if st := lstat(t, outside+"/secret"); st.Mode != unix.S_IFREG|0o600 || st.Nlink != 1 || st.Uid != 0 {
		t.Errorf("the secret is %+v", st)
	}
}

// TestSwappedSymlink looks up through a name that is a directory one moment and a symlink out of the
// share the next.
func TestSwappedSymlink(t *testing.T) {
	outside, host := hostileDirs(t)
	ok(t, os.Mkdir(host+"/dir", 0o755))
	ok(t, os.WriteFile(host+"/dir/secret", []byte("mine"), 0o600))
	ok(t, os.Symlink(outside, host+"/link"))
	ok(t, os.WriteFile(host+"/file", []byte("mine"), 0o600))
	ok(t, os.Symlink(outside+"/secret", host+"/filelink"))
	g := newGuest(t, serveDir(t, host))
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			exchange(host+"/dir", host+"/link")
			exchange(host+"/file", host+"/filelink")
		}
	})
	mine, links := 0, 0
	for range 20_000 {
		dir, _ := g.lookup(fuse.FUSE_ROOT_ID, "dir")
		node, code := g.lookup(dir, "secret")
		if code == unix.ENOTDIR {
			links++
		}
		mine += g.readsMine(node)
		file, _ := g.lookup(fuse.FUSE_ROOT_ID, "file")
		mine += g.readsMine(file)
		// By name, without a lookup before.
		_, b := g.send(wire(opCreate, fuse.FUSE_ROOT_ID, fuse.CreateIn{Flags: unix.O_RDONLY, Mode: 0o600}, "file\x00"), 4096)
		if fh := answer[fuse.CreateOut](b).Fh; fh != 0 {
			mine += g.isMine(fh)
		}
	}
	close(stop)
	swapper.Wait()
	if mine == 0 || links == 0 {
		t.Errorf("%d reads of files, %d lookups in symlinks: the swap was never seen", mine, links)
	}
	unchanged(t, outside)
}

func exchange(a, b string) { unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE) }

// readsMine opens and reads a node, which has to be the guest's.
func (g *guest) readsMine(node uint64) int {
	g.t.Helper()
	if node == 0 {
		return 0
	}
	fh, code := g.open(node, unix.O_RDONLY)
	if code != 0 {
		return 0
	}
	return g.isMine(fh)
}

func (g *guest) isMine(fh uint64) int {
	g.t.Helper()
	got, _ := g.read(0, fh, 100)
	if got != "mine" {
		g.t.Fatalf("the guest reads %q", got)
	}
	g.send(wire(opRelease, 0, fuse.ReleaseIn{Fh: fh}), 4096)
	return 1
}

func TestForget(t *testing.T) {
	_, host := hostileDirs(t)
	f := serveDir(t, host)
	g := newGuest(t, f)
	used := f.budget.used.Load()
	node, _ := g.lookup(fuse.FUSE_ROOT_ID, "inside")
	if again, _ := g.lookup(fuse.FUSE_ROOT_ID, "inside"); again != node {
		t.Errorf("it is node %d and %d", node, again)
	}
	forget := func(id, n uint64) { g.send(wire(opForget, id, fuse.ForgetIn{Nlookup: n}), 4096) }
	forget(node, 1)
	if _, code := g.open(node, unix.O_RDONLY); code != 0 {
		t.Errorf("it was forgotten once of two: %v", code)
	}
	// An operation that has begun keeps the descriptor.
	n := must(f.nodes.get(node))(t)
	forget(node, math.MaxUint64)
	forget(node, 1)
	forget(fuse.FUSE_ROOT_ID, math.MaxUint64)
	forget(12345, 1)
	if _, code := g.open(node, unix.O_RDONLY); code != unix.ESTALE {
		t.Errorf("after more forgets than lookups: %v", code)
	}
	var st unix.Stat_t
	ok(t, unix.Fstat(n.fd, &st))
	if want := lstat(t, host+"/inside"); st.Ino != want.Ino {
		t.Error("its descriptor is another's")
	}
	n.put()
	if again, _ := g.lookup(fuse.FUSE_ROOT_ID, "inside"); again <= node {
		t.Errorf("node %d after %d was forgotten", again, node)
	}
	g.send(wire(opBatch, 0, struct {
		fuse.InHeader
		Count, Dummy uint32
	}{Count: math.MaxUint32}, string(make([]byte, 16))), 4096)
	// One file is open, one node known.
	if now := f.budget.used.Load() - used; now != 2 {
		t.Errorf("%d descriptors are open; want 2", now)
	}
}

// TestReadAfterClose has a guest close a file between its read and the answer, when the server
// reads into the guest's memory.
func TestReadAfterClose(t *testing.T) {
	outside, host := hostileDirs(t)
	f := serveDir(t, host)
	fh, _ := createFile(t, f, "file")
	in := &fuse.ReadIn{Fh: fh, Size: 100}
	if _, code := f.Write(nil, &fuse.WriteIn{Fh: fh}, []byte("mine")); !code.Ok() {
		t.Fatal(code)
	}
	result, code := f.Read(nil, in, nil)
	if !code.Ok() {
		t.Fatal(code)
	}
	f.Release(nil, &fuse.ReleaseIn{Fh: fh})
	// The kernel gives the lowest numbers that are free.
	for range 50 {
		defer must(os.Open(outside + "/secret"))(t).Close()
	}
	a, b := make([]byte, 2), make([]byte, 98)
	n, code := result.(*reading).Readv([][]byte{a, b})
	if !code.Ok() || n != 4 || string(a)+string(b[:2]) != "mine" {
		t.Errorf("it read %q%q (%d): %v", a, b, n, code)
	}
	result.Done()
}

// TestNoSuchThing sends what is about nodes and handles that are not there.
func TestNoSuchThing(t *testing.T) {
	outside, host := hostileDirs(t)
	g := newGuest(t, serveDir(t, host))
	for _, id := range []uint64{0, 2, 77, 1 << 63, math.MaxUint64 - 1} {
		for what, req := range named(id, "name") {
			if code, _ := g.send(req, 4096); code != unix.ESTALE {
				t.Errorf("%s in node %d: %v", what, id, code)
			}
		}
		for what, req := range byNode(id) {
			if code, _ := g.send(req, 1<<17); code != unix.ESTALE {
				t.Errorf("%s of node %d: %v", what, id, code)
			}
		}
		for what, req := range byHandle(id) {
			if code, _ := g.send(req, 1<<17); code != unix.EBADF {
				t.Errorf("%s of handle %d: %v", what, id, code)
			}
		}
		g.send(wire(opRelease, id, fuse.ReleaseIn{Fh: id}), 4096)
		g.send(wire(opReleasedir, id, fuse.ReleaseIn{Fh: id}), 4096)
	}
	unchanged(t, outside)
}

func byNode(id uint64) map[string][]byte {
	return map[string][]byte{
		"getattr":     wire(opGetattr, id, fuse.GetAttrIn{}),
		"setattr":     wire(opSetattr, id, fuse.SetAttrIn{}),
		"readlink":    wire(opReadlink, id, fuse.InHeader{}),
		"open":        wire(opOpen, id, fuse.OpenIn{}),
		"opendir":     wire(opOpendir, id, fuse.OpenIn{}),
		"statfs":      wire(opStatfs, id, fuse.InHeader{}),
		"setxattr":    wire(opSetxattr, id, fuse.SetXAttrIn{Size: 1}, "user.a\x00v"),
		"getxattr":    wire(opGetxattr, id, fuse.GetXAttrIn{}, "user.a\x00"),
		"listxattr":   wire(opListxattr, id, fuse.GetXAttrIn{Size: 100}),
		"removexattr": wire(opRmxattr, id, fuse.InHeader{}, "user.a\x00"),
		"setlk":       wire(opSetlk, id, fuse.LkIn{}),
		"tmpfile":     wire(opTmpfile, id, fuse.CreateIn{Flags: unix.O_RDWR}, "/\x00"),
	}
}

func byHandle(fh uint64) map[string][]byte {
	const root = fuse.FUSE_ROOT_ID
	return map[string][]byte{
		"getattr":     wire(opGetattr, root, fuse.GetAttrIn{Flags_: fuse.FUSE_GETATTR_FH, Fh_: fh}),
		"read":        wire(opRead, root, fuse.ReadIn{Fh: fh, Size: 10}),
		"write":       wire(opWrite, root, fuse.WriteIn{Fh: fh, Size: 1}, "x"),
		"flush":       wire(opFlush, root, fuse.FlushIn{Fh: fh}),
		"fsync":       wire(opFsync, root, fuse.FsyncIn{Fh: fh}),
		"fsyncdir":    wire(opFsyncdir, root, fuse.FsyncIn{Fh: fh}),
		"readdir":     wire(opReaddir, root, fuse.ReadIn{Fh: fh, Size: 4096}),
		"readdirplus": wire(opReaddirp, root, fuse.ReadIn{Fh: fh, Size: 4096}),
		"fallocate":   wire(opFallocate, root, fuse.FallocateIn{Fh: fh, Length: 1}),
		"lseek":       wire(opLseek, root, fuse.LseekIn{Fh: fh, Whence: unix.SEEK_DATA}),
		"copy":        wire(opCopy, root, fuse.CopyFileRangeIn{FhIn: fh, FhOut: fh}),
		"getlk":       wire(opGetlk, root, fuse.LkIn{Fh: fh}),
		"flock":       wire(opSetlkw, root, fuse.LkIn{Fh: fh, LkFlags: fuse.LK_FLOCK}),
	}
}

// TestNumbers sends offsets and sizes that no file has.
func TestNumbers(t *testing.T) {
	_, host := hostileDirs(t)
	f := serveDir(t, host)
	g := newGuest(t, f)
	fh, node := createFile(t, f, "file")
	huge := uint64(math.MaxUint64)
	for what, req := range map[string][]byte{
		"read of 4 GiB":        wire(opRead, node, fuse.ReadIn{Fh: fh, Size: math.MaxUint32}),
		"read far away":        wire(opRead, node, fuse.ReadIn{Fh: fh, Offset: math.MaxInt64, Size: 10}),
		"read below 0":         wire(opRead, node, fuse.ReadIn{Fh: fh, Offset: huge, Size: 10}),
		"write far away":       wire(opWrite, node, fuse.WriteIn{Fh: fh, Offset: math.MaxInt64, Size: 1}, "x"),
		"write below 0":        wire(opWrite, node, fuse.WriteIn{Fh: fh, Offset: huge, Size: 1}, "x"),
		"write of too much":    wire(opWrite, node, fuse.WriteIn{Fh: fh}, strings.Repeat("x", MaxWrite+1)),
		"fallocate":            wire(opFallocate, node, fuse.FallocateIn{Fh: fh, Offset: 1, Length: huge}),
		"fallocate past int64": wire(opFallocate, node, fuse.FallocateIn{Fh: fh, Offset: math.MaxInt64, Length: math.MaxInt64}),
		"lseek":                wire(opLseek, node, fuse.LseekIn{Fh: fh, Offset: huge, Whence: unix.SEEK_DATA}),
		"lseek from the end":   wire(opLseek, node, fuse.LseekIn{Fh: fh, Whence: io.SeekEnd}),
		"copy":                 wire(opCopy, node, fuse.CopyFileRangeIn{FhIn: fh, FhOut: fh, OffIn: huge, Len: huge}),
		"copy with flags":      wire(opCopy, node, fuse.CopyFileRangeIn{FhIn: fh, FhOut: fh, Flags: 1, Len: 1}),
		"truncate":             wire(opSetattr, node, fuse.SetAttrIn{SetAttrInCommon: fuse.SetAttrInCommon{Valid: fuse.FATTR_SIZE, Size: huge}}),
		"chown to -1":          wire(opSetattr, node, fuse.SetAttrIn{SetAttrInCommon: fuse.SetAttrInCommon{Valid: fuse.FATTR_UID, Owner: fuse.Owner{Uid: math.MaxUint32}}}),
		"create as -1":         wire(opCreate, 1, fuse.CreateIn{InHeader: fuse.InHeader{Caller: fuse.Caller{Owner: fuse.Owner{Uid: math.MaxUint32}}}}, "minus\x00"),
		"open for nothing":     wire(opOpen, node, fuse.OpenIn{Flags: unix.O_ACCMODE}),
		"xattr of 4 GiB":       wire(opGetxattr, node, fuse.GetXAttrIn{Size: math.MaxUint32}, "user.a\x00"),
	} {
		if code, _ := g.send(req, 4096); code == 0 {
			t.Errorf("%s is fine", what)
		}
	}
	if st := lstat(t, host+"/file"); st.Size != 0 || st.Blocks != 0 {
		t.Errorf("the file is %+v", st)
	}
	// An answer in many pieces, more than the kernel takes at once.
	text := strings.Repeat("0123456789", 1000)
	ok(t, os.WriteFile(host+"/file", []byte(text), 0o600))
	var pieces [][]byte
	for range 5000 {
		pieces = append(pieces, make([]byte, 3), nil)
	}
	if n, _ := g.ps.HandleRequest([][]byte{wire(opRead, node, fuse.ReadIn{Fh: fh, Size: 9000})}, pieces); n != 9016 {
		t.Errorf("the answer has %d bytes", n)
	}
	var got strings.Builder
	for _, p := range pieces {
		got.Write(p)
	}
	if got.String()[16:9016] != text[:9000] {
		t.Error("the answer is not the file")
	}
}

// TestKinds opens what is not a file.
func TestKinds(t *testing.T) {
	_, host := hostileDirs(t)
	ok(t, unix.Mkfifo(host+"/fifo", 0o600))
	ok(t, unix.Mknod(host+"/null", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	ok(t, os.Symlink("inside", host+"/link"))
	ok(t, os.Mkdir(host+"/dir", 0o700))
	g := newGuest(t, serveDir(t, host))
	for name, want := range map[string]unix.Errno{"fifo": unix.EACCES, "null": unix.EACCES, "link": unix.EACCES, "dir": unix.EISDIR} {
		node, code := g.lookup(fuse.FUSE_ROOT_ID, name)
		if code != 0 {
			t.Fatal(code)
		}
		for _, flags := range []uint32{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR | unix.O_TRUNC} {
			if _, code := g.open(node, flags); code != want {
				t.Errorf("open of %s: %v; want %v", name, code, want)
			}
			create := wire(opCreate, fuse.FUSE_ROOT_ID, fuse.CreateIn{Flags: flags, Mode: 0o600}, name+"\x00")
			if code, _ := g.send(create, 4096); code != want {
				t.Errorf("create of %s: %v; want %v", name, code, want)
			}
		}
	}
}

func TestBudget(t *testing.T) {
	_, host := hostileDirs(t)
	f := serveDir(t, host)
	g := newGuest(t, f)
	node, _ := g.lookup(fuse.FUSE_ROOT_ID, "inside")
	take := f.budget.all.left.Load() - 2
	f.budget.all.left.Add(-take)
	var last unix.Errno
	opened := 0
	for range 5 {
		fh, code := g.open(node, unix.O_RDONLY)
		if last = code; code == 0 && fh != 0 {
			opened++
		}
	}
	if opened != 2 || last != unix.EMFILE {
		t.Errorf("%d files are open, then %v", opened, last)
	}
	before := descriptors(t)
	for i := range 5 {
		create := wire(opCreate, fuse.FUSE_ROOT_ID, fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o600}, fmt.Sprintf("new%d\x00", i))
		if code, _ := g.send(create, 4096); code != unix.EMFILE {
			t.Errorf("create: %v", code)
		}
	}
	// One for the node, none for the handle.
	f.budget.all.left.Add(1)
	create := wire(opCreate, fuse.FUSE_ROOT_ID, fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o600}, "half\x00")
	if code, _ := g.send(create, 4096); code != unix.EMFILE || f.budget.all.left.Load() != 1 {
		t.Errorf("create: %v, and %d descriptors are left", code, f.budget.all.left.Load())
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors became %d", before, after)
	}
	f.budget.all.left.Add(take - 1)
}

func descriptors(t *testing.T) int {
	t.Helper()
	return len(must(filepath.Glob("/proc/self/fd/*"))(t))
}

// TestManyAtOnce has everything used and taken away at once, for the race detector and the counts.
func TestManyAtOnce(t *testing.T) {
	outside, host := hostileDirs(t)
	f := serveDir(t, host)
	g := newGuest(t, f)
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			for i := range 300 {
				name := fmt.Sprintf("f%d", i%3)
				caller := fuse.InHeader{Caller: fuse.Caller{Owner: fuse.Owner{Uid: uint32(w % 2 * 1000)}}}
				_, b := g.send(wire(opCreate, fuse.FUSE_ROOT_ID, fuse.CreateIn{InHeader: caller, Flags: unix.O_RDWR, Mode: 0o600}, name+"\x00"), 4096)
				out := answer[fuse.CreateOut](b)
				g.send(wire(opWrite, out.NodeId, fuse.WriteIn{Fh: out.Fh, Size: 4}, "mine"), 4096)
				if got, code := g.read(out.NodeId, out.Fh, 100); code == 0 && got != "mine" {
					t.Errorf("it reads %q", got)
				}
				lk := fuse.LkIn{Fh: out.Fh, Owner: uint64(w), Lk: fuse.FileLock{Typ: unix.F_RDLCK, End: 1}}
				g.send(wire(opSetlk, out.NodeId, lk), 4096)
				g.send(wire(opForget, out.NodeId, fuse.ForgetIn{Nlookup: uint64(i % 3)}), 4096)
				g.send(wire(opRelease, out.NodeId, fuse.ReleaseIn{Fh: out.Fh - uint64(i%2)}), 4096)
				g.send(wire(opUnlink, fuse.FUSE_ROOT_ID, fuse.InHeader{}, name+"\x00"), 4096)
			}
		})
	}
	all.Wait()
	unchanged(t, outside)
}
