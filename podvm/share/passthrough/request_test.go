package passthrough

import (
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Opcodes of the protocol. Source: linux/fuse.h.
const (
	opLookup     = 1
	opForget     = 2
	opGetattr    = 3
	opSetattr    = 4
	opReadlink   = 5
	opSymlink    = 6
	opMknod      = 8
	opMkdir      = 9
	opUnlink     = 10
	opRmdir      = 11
	opRename     = 12
	opLink       = 13
	opOpen       = 14
	opRead       = 15
	opWrite      = 16
	opStatfs     = 17
	opRelease    = 18
	opFsync      = 20
	opSetxattr   = 21
	opGetxattr   = 22
	opListxattr  = 23
	opRmxattr    = 24
	opFlush      = 25
	opInit       = 26
	opOpendir    = 27
	opReaddir    = 28
	opReleasedir = 29
	opFsyncdir   = 30
	opGetlk      = 31
	opSetlk      = 32
	opSetlkw     = 33
	opAccess     = 34
	opCreate     = 35
	opInterrupt  = 36
	opIoctl      = 39
	opBatch      = 42
	opFallocate  = 43
	opReaddirp   = 44
	opRename2    = 45
	opLseek      = 46
	opCopy       = 47
	opTmpfile    = 51
)

// wire makes a request as a guest would, of the operation's input, which begins with the header.
func wire[T any](op uint32, node uint64, in T, payload ...string) []byte {
	head := (*fuse.InHeader)(unsafe.Pointer(&in))
	head.Opcode, head.NodeId, head.Unique = op, node, 1
	b := slices.Clone(unsafe.Slice((*byte)(unsafe.Pointer(&in)), unsafe.Sizeof(in)))
	for _, p := range payload {
		b = append(b, p...)
	}
	(*fuse.InHeader)(unsafe.Pointer(&b[0])).Length = uint32(len(b))
	return b
}

// guest is what sends requests.
type guest struct {
	t  testing.TB
	ps *fuse.ProtocolServer
	fs *FS
}

func newGuest(t testing.TB, f *FS) *guest {
	g := &guest{t, fuse.NewProtocolServer(f, f.Options()), f}
	init := fuse.InitIn{Major: 7, Minor: 41, Flags: ^uint32(0), Flags2: ^uint32(0)}
	if code, _ := g.send(wire(opInit, 0, init), 4096); code != 0 {
		t.Fatalf("init: %v", code)
	}
	return g
}

// send returns the status and what follows the header. The answer has room for size bytes.
func (g *guest) send(req []byte, size int) (unix.Errno, []byte) {
	g.t.Helper()
	out := make([]byte, size)
	n, code := g.ps.HandleRequest([][]byte{req}, [][]byte{out})
	if !code.Ok() {
		return unix.Errno(code), nil
	}
	const header = int(unsafe.Sizeof(fuse.OutHeader{}))
	if n < header {
		return 0, nil // no answer
	}
	return unix.Errno(-(*fuse.OutHeader)(unsafe.Pointer(&out[0])).Status), out[header:n]
}

// answer reads the answer of an operation.
func answer[T any](b []byte) (v T) {
	if len(b) >= int(unsafe.Sizeof(v)) {
		v = *(*T)(unsafe.Pointer(unsafe.SliceData(b)))
	}
	return v
}

func (g *guest) lookup(dir uint64, name string) (uint64, unix.Errno) {
	code, b := g.send(wire(opLookup, dir, fuse.InHeader{}, name+"\x00"), 4096)
	return answer[fuse.EntryOut](b).NodeId, code
}

func (g *guest) open(node uint64, flags uint32) (uint64, unix.Errno) {
	code, b := g.send(wire(opOpen, node, fuse.OpenIn{Flags: flags}), 4096)
	return answer[fuse.OpenOut](b).Fh, code
}

func (g *guest) read(node, fh uint64, size uint32) (string, unix.Errno) {
	code, b := g.send(wire(opRead, node, fuse.ReadIn{Fh: fh, Size: size}), int(size)+4096)
	return string(b), code
}

// named are all requests with a name, of a directory.
func named(dir uint64, name string) map[string][]byte {
	z := name + "\x00"
	return map[string][]byte{
		"lookup":      wire(opLookup, dir, fuse.InHeader{}, z),
		"symlink":     wire(opSymlink, dir, fuse.InHeader{}, z, "target\x00"),
		"mknod":       wire(opMknod, dir, fuse.MknodIn{Mode: unix.S_IFREG | 0o600}, z),
		"mkdir":       wire(opMkdir, dir, fuse.MkdirIn{Mode: 0o700}, z),
		"unlink":      wire(opUnlink, dir, fuse.InHeader{}, z),
		"rmdir":       wire(opRmdir, dir, fuse.InHeader{}, z),
		"create":      wire(opCreate, dir, fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o600}, z),
		"link":        wire(opLink, dir, fuse.LinkIn{Oldnodeid: fuse.FUSE_ROOT_ID}, z),
		"rename from": wire(opRename2, dir, fuse.RenameIn{Newdir: dir}, z, "fine\x00"),
		"rename to":   wire(opRename2, dir, fuse.RenameIn{Newdir: dir}, "inside\x00", z),
	}
}

func TestNames(t *testing.T) {
	outside, host := hostileDirs(t)
	g := newGuest(t, serveDir(t, host))
	wrong := map[string]unix.Errno{
		"": unix.EINVAL, ".": unix.EINVAL, "..": unix.EINVAL, "/": unix.EINVAL, "../secret": unix.EINVAL,
		"a/b": unix.EINVAL, "/etc": unix.EINVAL, outside + "/secret": unix.EINVAL, "inside/": unix.EINVAL,
		strings.Repeat("n", 256): unix.ENAMETOOLONG,
	}
	for name, want := range wrong {
		for what, req := range named(fuse.FUSE_ROOT_ID, name) {
			if code, _ := g.send(req, 4096); code != want {
				t.Errorf("%s of %.20q: %v; want %v", what, name, code, want)
			}
		}
	}
	if err := checkName("a\x00b"); err != unix.EINVAL {
		t.Errorf("a name with NUL: %v", err)
	}
	for what, req := range named(fuse.FUSE_ROOT_ID, strings.Repeat("n", 255)) {
		if code, _ := g.send(req, 4096); code == unix.EINVAL || code == unix.ENAMETOOLONG {
			t.Errorf("%s of the longest name: %v", what, code)
		}
	}
	unchanged(t, outside)
}
