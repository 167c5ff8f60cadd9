package passthrough

import (
	"bytes"
	"encoding/binary"
	"os"
	"sync"
	"testing"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// FuzzRequest sends several requests, each with its length in two bytes before it. None may panic,
// and nothing outside the share may change or be read.
func FuzzRequest(f *testing.F) {
	const node, fh = 2, 1 // what the first of seeds makes
	create := wire(opCreate, fuse.FUSE_ROOT_ID, fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o600}, "file\x00")
	seed := func(reqs ...[]byte) { f.Add(packed(append([][]byte{create}, reqs...)...)) }
	for _, some := range []map[string][]byte{
		named(fuse.FUSE_ROOT_ID, "name"), named(fuse.FUSE_ROOT_ID, "../secret"), byNode(node), byNode(1), byHandle(fh),
	} {
		for _, req := range some {
			seed(req)
		}
	}
	all := fuse.SetAttrInCommon{Valid: ^uint32(0), Fh: fh, Size: 10, Mode: 0o6777}
	seed(wire(opSetattr, node, fuse.SetAttrIn{SetAttrInCommon: all}))
	seed(wire(opForget, node, fuse.ForgetIn{Nlookup: 1}), wire(opRelease, node, fuse.ReleaseIn{Fh: fh}))
	seed(wire(opOpendir, 1, fuse.OpenIn{}), wire(opReaddir, 1, fuse.ReadIn{Fh: 2, Size: 4096}), wire(opReaddirp, 1, fuse.ReadIn{Fh: 2, Size: 4096}))
	seed(wire(opSymlink, 1, fuse.InHeader{}, "out\x00..\x00"), wire(opLookup, 3, fuse.InHeader{}, "secret\x00"))
	seed(wire(opRename, 1, struct {
		fuse.InHeader
		Newdir uint64
	}{Newdir: 1}, "file\x00other\x00"))
	lock := fuse.LkIn{Fh: fh, Owner: 1, Lk: fuse.FileLock{Typ: unix.F_WRLCK, End: 5}}
	seed(wire(opSetlk, node, lock), wire(opSetlkw, node, lock), wire(opGetlk, node, lock), wire(opInterrupt, 0, fuse.InterruptIn{Unique: 1}))
	seed(wire(opIoctl, node, fuse.IoctlIn{Fh: fh}), wire(opAccess, node, fuse.AccessIn{}))
	f.Fuzz(fuzz)
}

func packed(reqs ...[]byte) (b []byte) {
	for _, r := range reqs {
		b = append(binary.LittleEndian.AppendUint16(b, uint16(len(r))), r...)
	}
	return b
}

func fuzz(t *testing.T, data []byte) {
	// A file system of its own, which the largest file can't fill the disk by.
	outside := t.TempDir()
	if err := unix.Mount("tmpfs", outside, "tmpfs", 0, "size=8m,nr_inodes=1000,mode=755"); err != nil {
		t.Skipf("needs to mount a tmpfs: %v", err)
	}
	defer unix.Unmount(outside, unix.MNT_DETACH)
	share := outside + "/share"
	ok(t, os.WriteFile(outside+"/secret", []byte(secret), 0o600))
	ok(t, os.Mkdir(share, 0o755))
	fs := serveDir(t, share)
	o := fs.Options()
	o.PanicHandler = func(what any) fuse.Status { panic(what) }
	g := &guest{t, fuse.NewProtocolServer(fs, o), fs}
	init := fuse.InitIn{Major: 7, Minor: 41, Flags: ^uint32(0), Flags2: ^uint32(0)}
	g.send(wire(opInit, 0, init), 4096)
	var waiting sync.WaitGroup
	for len(data) > 2 {
		size := min(int(binary.LittleEndian.Uint16(data)), len(data)-2)
		req := bytes.Clone(data[2 : 2+size])
		data = data[2+size:]
		if size >= 8 && binary.LittleEndian.Uint32(req[4:]) == opSetlkw {
			waiting.Go(func() { g.send(req, 8192) })
			continue
		}
		if size >= int(unsafe.Sizeof(fuse.InHeader{})) {
			if _, got := g.send(req, 8192); bytes.Contains(got, []byte(secret)) {
				t.Errorf("the guest reads the secret by %x", req)
			}
		}
	}
	fs.Close()
	waiting.Wait()
	unchanged(t, outside)
}
