package guest

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/share"
	"github.com/caisson-vm/caisson/podvm/share/passthrough"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// servedHere is a host directory that the test serves itself.
type servedHere struct {
	*passthrough.FS
	link   *agent.Link
	looked func(name string)
}

func (f *servedHere) Lookup(cancel <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if f.looked != nil {
		f.looked(name)
	}
	return f.FS.Lookup(cancel, in, name, out)
}

func (s *sharing) serveHere(d share.Dir) *servedHere {
	s.Helper()
	root, err := os.OpenFile(d.Path, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		s.Fatal(err)
	}
	fs, err := passthrough.New(root)
	if err != nil {
		s.Fatal(err)
	}
	f := &servedHere{FS: fs, link: agent.NewLink()}
	server := fuse.NewProtocolServer(f, f.Options())
	conn, err := s.guest.Dial(s.ctx, 0)
	if err != nil {
		s.Fatal(err)
	}
	f.link.Take()
	got, err := agent.Handshake(s.ctx, conn, agent.Header{Kind: agent.KindShare, Tag: d.Tag, Session: 1})
	if err != nil {
		s.Fatal(err)
	}
	ended := make(chan struct{})
	s.Cleanup(func() { f.link.Close(); <-ended; f.Close() })
	go func() {
		defer close(ended)
		f.link.Run(conn, got.Received, func(_ context.Context, request []byte) error {
			go func() {
				reply := make([]byte, agent.MessageMax)
				n, code := server.HandleRequest([][]byte{request}, [][]byte{reply})
				if !code.Ok() {
					n = 16
					copy(reply[8:], request[8:16])
					binary.LittleEndian.PutUint32(reply, 16)
					binary.LittleEndian.PutUint32(reply[4:], -uint32(code))
				}
				if n > 0 {
					f.link.Send(reply[:n])
				}
			}()
			return nil
		})
	}()
	return f
}

// TestNoticeLeavesReplies has the host tell the guest to forget a name of a directory in which it waits for
// an answer.
func TestNoticeLeavesReplies(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		d := s.dir()
		s.write(filepath.Join(d.Path, "file"), "hello\n")
		f := s.serveHere(d)
		f.looked = func(name string) {
			m := make([]byte, 16, 64) // struct fuse_out_header
			binary.LittleEndian.PutUint32(m[4:], 3)
			m = binary.LittleEndian.AppendUint64(m, fuse.FUSE_ROOT_ID)
			m = binary.LittleEndian.AppendUint64(m, uint64(len(name)))
			m = append(append(m, name...), 0)
			binary.LittleEndian.PutUint32(m, uint32(len(m)))
			f.link.Send(m)
		}
		if code, out, _ := s.result(s.container("a", "cat /host/file", d)); code != 0 || out != "hello\n" {
			s.Errorf("exit %d, %q", code, out)
		}
	})
}

// TestDropNames has the guest forget what it does not use, when the host tells it.
func TestDropNames(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		d := s.dir()
		const files = 100
		for i := range files {
			dir := filepath.Join(d.Path, fmt.Sprint("dir", i%7))
			os.MkdirAll(dir, 0o755)
			s.write(filepath.Join(dir, fmt.Sprint("file", i)), "hello\n")
		}
		f := s.serveHere(d)
		r := s.container("a", "cd /host/dir3; exec 3<../dir2/file2; cat ../*/file* | wc -l; : > ../all; until [ -e ../stop ]; do sleep 0.1; done; cat <&3; pwd", d)
		s.until(func() bool { _, err := os.Stat(filepath.Join(d.Path, "all")); return err == nil })
		if n := s.known(d); n < files {
			s.Errorf("it knows %d files", n)
		}
		if err := f.link.Send(agent.DropNames()); err != nil {
			s.Fatal(err)
		}
		s.until(func() bool { return s.known(d) < files/10 })
		s.write(filepath.Join(d.Path, "stop"), "")
		if code, out, _ := s.result(r); code != 0 || strings.TrimSpace(out) != "100\nhello\n/host/dir3" {
			s.Errorf("exit %d, %q", code, out)
		}
	})
}

// known counts the files of a directory that this process has open.
func (s *sharing) known(d share.Dir) (n int) {
	s.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		s.Fatal(err)
	}
	for _, e := range all {
		if path, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(path, d.Path) {
			n++
		}
	}
	return n
}
