package share

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/share/passthrough"
)

// message is a FUSE request with a body.
func message(opcode uint32, body ...byte) []byte {
	m := make([]byte, inHeader)
	binary.LittleEndian.PutUint32(m, uint32(inHeader+len(body)))
	binary.LittleEndian.PutUint32(m[4:], opcode)
	binary.LittleEndian.PutUint64(m[8:], 0x1122334455667788)
	binary.LittleEndian.PutUint64(m[16:], 1) // the root
	return append(m, body...)
}

func serveDir(t testing.TB, readOnly bool) (*session, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "served")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSession(root, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func status(t *testing.T, reply []byte) unix.Errno {
	t.Helper()
	if len(reply) < outHeader || binary.LittleEndian.Uint64(reply[8:]) != 0x1122334455667788 {
		t.Fatalf("a reply of %d bytes for another request", len(reply))
	}
	return unix.Errno(-int32(binary.LittleEndian.Uint32(reply[4:])))
}

// TestReadOnly makes each request that writes, with a body that would do something.
func TestReadOnly(t *testing.T) {
	body := append(make([]byte, 128), "name\x00other\x00"...)
	requests := map[uint32][]byte{opOpen: binary.LittleEndian.AppendUint32(nil, unix.O_RDWR)}
	for _, op := range []uint32{
		opSetattr, opSymlink, opMknod, opMkdir, opUnlink, opRmdir, opRename, opLink, opWrite, opSetxattr, opRemovexattr,
		opCreate, opFallocate, opRename2, opCopyFileRange, opTmpfile, opCopyFile64,
	} {
		requests[op] = body
	}
	s, _ := serveDir(t, true)
	for op, body := range requests {
		r, err := parse(message(op, body...))
		if err != nil {
			t.Fatal(err)
		}
		if e := status(t, s.answer(r)); e != unix.EROFS {
			t.Errorf("request %d: %v", op, e)
		}
	}
	r, err := parse(message(opOpen, make([]byte, 8)...))
	if err != nil || r.writes() {
		t.Errorf("open for reading is taken for a write, %v", err)
	}
}

func TestMalformed(t *testing.T) {
	s, _ := serveDir(t, false)
	long := message(opRead)
	binary.LittleEndian.PutUint32(long, 1<<30)
	for name, m := range map[string][]byte{"empty": {}, "short": make([]byte, inHeader-1), "of another length": long} {
		if err := s.deliver(context.Background(), m); err == nil {
			t.Errorf("a request that is %s is taken", name)
		}
	}
}

// TestReplyMax shows that a guest can't have memory set aside by asking.
func TestReplyMax(t *testing.T) {
	for _, op := range []uint32{opRead, opReaddir, opReaddirplus, opGetxattr, opListxattr} {
		body := make([]byte, 40)
		for i := range body {
			body[i] = 0xff
		}
		r, err := parse(message(op, body...))
		if err != nil {
			t.Fatal(err)
		}
		if n := r.replyMax(); n > agent.MessageMax || n < passthrough.MaxWrite {
			t.Errorf("request %d that asks for 4 GiB: a reply of %d bytes", op, n)
		}
	}
}

// TestWaitersLeaveRoom shows that requests which wait for a lock keep none from giving it back.
func TestWaitersLeaveRoom(t *testing.T) {
	s, _ := serveDir(t, false)
	for range requestsMax {
		s.requests <- struct{}{}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.deliver(context.Background(), message(opSetlkw, make([]byte, 48)...)); err != nil {
		t.Errorf("a wait for a lock: %v", err)
	}
	if err := s.deliver(ctx, message(opOpen, make([]byte, 8)...)); err == nil {
		t.Error("a request beyond the limit is taken")
	}
}

func FuzzRequest(f *testing.F) {
	f.Add(message(opRead, make([]byte, 40)...))
	f.Add(message(opGetxattr, append(make([]byte, 8), "user.x\x00"...)...))
	f.Add(message(26, make([]byte, 64)...)) // INIT
	s, _ := serveDir(f, true)
	f.Fuzz(func(t *testing.T, m []byte) {
		r, err := parse(m)
		if err != nil || r.opcode == opSetlkw {
			return
		}
		reply := s.answer(r)
		if len(reply) == 0 {
			return
		}
		if n := binary.LittleEndian.Uint32(reply); int(n) != len(reply) || len(reply) > agent.MessageMax {
			t.Errorf("a reply of %d bytes says %d", len(reply), n)
		}
		if e := int32(binary.LittleEndian.Uint32(reply[4:])); e > 0 || e < -4095 {
			t.Errorf("error %d: the guest's kernel takes none of these", e)
		}
		if fuse.Status(-int32(binary.LittleEndian.Uint32(reply[4:]))) != fuse.OK && len(reply) != outHeader {
			t.Errorf("an error with %d bytes of data", len(reply)-outHeader)
		}
	})
}
