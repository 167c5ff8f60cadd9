package passthrough

import (
	"encoding/binary"
	"errors"
	"os"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// makers make each kind of entry.
var makers = map[string]func(path string) error{
	"file": func(path string) error {
		fd, err := unix.Open(path, unix.O_CREAT|unix.O_WRONLY, 0o666)
		unix.Close(fd)
		return err
	},
	"dir":     func(path string) error { return unix.Mkdir(path, 0o777) },
	"symlink": func(path string) error { return unix.Symlink("x", path) },
	"fifo":    func(path string) error { return unix.Mkfifo(path, 0o666) },
}

func TestCallersOwn(t *testing.T) {
	mnt, host := mounted(t)
	ok(t, os.Mkdir(host+"/plain", 0o777))
	ok(t, os.Mkdir(host+"/setgid", 0o777))
	ok(t, os.Chown(host+"/setgid", 0, 4242))
	ok(t, unix.Chmod(host+"/setgid", 0o2777))
	for kind, makes := range makers {
		for dir, gid := range map[string]uint32{"plain": 1001, "setgid": 4242} {
			ok(t, asUser(1000, 1001, func() error { return makes(mnt + "/" + dir + "/" + kind) }))
			st := lstat(t, host+"/"+dir+"/"+kind)
			if st.Uid != 1000 || st.Gid != gid {
				t.Errorf("a %s in %s is of %d:%d; want 1000:%d", kind, dir, st.Uid, st.Gid, gid)
			}
			if inherits := kind == "dir" && dir == "setgid"; st.Mode&unix.S_ISGID != 0 != inherits {
				t.Errorf("a %s in %s has the mode %o", kind, dir, st.Mode)
			}
		}
		ok(t, makes(mnt+"/setgid/root-"+kind))
		if st := lstat(t, host+"/setgid/root-"+kind); st.Uid != 0 || st.Gid != 4242 {
			t.Errorf("root's %s is of %d:%d", kind, st.Uid, st.Gid)
		}
	}
	// Each thread that was another is itself again.
	for range 100 {
		c := must(ownCreds())(t)
		if c.uid != 0 || c.gid != 0 {
			t.Fatalf("a thread is still %d:%d", c.uid, c.gid)
		}
	}
}

// TestCallersMay has the guest's kernel, not the host's, say what a caller may.
func TestCallersMay(t *testing.T) {
	mnt, host := mounted(t)
	ok(t, os.Mkdir(host+"/secret", 0o700))
	ok(t, os.WriteFile(host+"/secret/file", nil, 0o600))
	if err := asUser(1000, 1000, func() error { return makers["file"](mnt + "/secret/mine") }); !errors.Is(err, unix.EACCES) {
		t.Errorf("a user makes a file in root's directory: %v", err)
	}
	// What that has allowed, by a group that the host's thread does not have or else, is done.
	g := newGuest(t, serveDir(t, host+"/secret"))
	caller := fuse.InHeader{Caller: fuse.Caller{Owner: fuse.Owner{Uid: 1000, Gid: 1000}}}
	create := wire(opCreate, fuse.FUSE_ROOT_ID, fuse.CreateIn{InHeader: caller, Flags: unix.O_RDWR, Mode: 0o600}, "mine\x00")
	if code, _ := g.send(create, 4096); code != 0 {
		t.Errorf("a create that the guest allowed: %v", code)
	}
	if st := lstat(t, host+"/secret/mine"); st.Uid != 1000 || st.Gid != 1000 {
		t.Errorf("it is of %d:%d", st.Uid, st.Gid)
	}
}

func TestUmaskAndDefaultACL(t *testing.T) {
	mnt, host := mounted(t)
	ok(t, os.Mkdir(host+"/acl", 0o777))
	ok(t, unix.Setxattr(host+"/acl", "system.posix_acl_default", defaultACL(), 0))
	ok(t, os.Mkdir(host+"/plain", 0o777))
	// The process that serves and this one are the same, so the umask is the mount's caller's only
	// when it is set on a thread of its own.
	for dir, want := range map[string]uint32{"plain": 0o640, "acl": 0o660} {
		ok(t, asUser(1000, 1000, func() error {
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return err
			}
			unix.Umask(0o027)
			return makers["file"](mnt + "/" + dir + "/file")
		}))
		if st := lstat(t, host+"/"+dir+"/file"); st.Mode&0o777 != want {
			t.Errorf("in %s the mode is %o; want %o", dir, st.Mode&0o777, want)
		}
	}
	buf := make([]byte, 200)
	n := must(unix.Getxattr(mnt+"/acl/file", "system.posix_acl_access", buf))(t)
	m := must(unix.Getxattr(host+"/acl/file", "system.posix_acl_access", buf[100:]))(t)
	if string(buf[:n]) != string(buf[100:100+m]) {
		t.Errorf("the ACL is %x; on the host %x", buf[:n], buf[100:100+m])
	}
}

// defaultACL is u::rwx,u:2000:rwx,g::rw-,m::rwx,o::---.
func defaultACL() []byte {
	acl := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{0x01, 7, ^uint32(0)}, {0x02, 7, 2000}, {0x04, 6, ^uint32(0)}, {0x10, 7, ^uint32(0)}, {0x20, 0, ^uint32(0)}} {
		acl = binary.LittleEndian.AppendUint16(acl, e.tag)
		acl = binary.LittleEndian.AppendUint16(acl, e.perm)
		acl = binary.LittleEndian.AppendUint32(acl, e.id)
	}
	return acl
}

// TestSetUserID has a user's change of a file take its set-user-ID bit, and root's not.
func TestSetUserID(t *testing.T) {
	mnt, host := mounted(t)
	changes := map[string]func(f int) error{
		"write":     func(f int) error { _, err := unix.Pwrite(f, []byte("x"), 0); return err },
		"truncate":  func(f int) error { return unix.Ftruncate(f, 0) },
		"fallocate": func(f int) error { return unix.Fallocate(f, 0, 0, 4096) },
		"open": func(int) error {
			again, err := unix.Open(mnt+"/suid", unix.O_WRONLY|unix.O_TRUNC, 0)
			unix.Close(again)
			return err
		},
	}
	for name, change := range changes {
		for _, uid := range []uint32{0, 1000} {
			ok(t, os.WriteFile(host+"/suid", []byte("program"), 0o777))
			ok(t, unix.Chmod(host+"/suid", 0o6777))
			fd := must(unix.Open(mnt+"/suid", unix.O_WRONLY, 0))(t)
			if uid == 0 {
				ok(t, change(fd))
			} else {
				ok(t, asUser(uid, uid, func() error { return change(fd) }))
			}
			unix.Close(fd)
			bits := lstat(t, host+"/suid").Mode & (unix.S_ISUID | unix.S_ISGID)
			if kept := bits != 0; kept != (uid == 0) {
				t.Errorf("after %s by %d the bits are %o", name, uid, bits)
			}
		}
	}
	ok(t, unix.Chmod(host+"/suid", 0o6777))
	ok(t, os.Chown(mnt+"/suid", 5, 5))
	if st := lstat(t, host+"/suid"); st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
		t.Errorf("after chown the mode is %o", st.Mode)
	}
}

func TestDevices(t *testing.T) {
	mnt, host := mounted(t)
	for name, mode := range map[string]uint32{"fifo": unix.S_IFIFO, "socket": unix.S_IFSOCK, "file": unix.S_IFREG, "whiteout": unix.S_IFCHR} {
		ok(t, unix.Mknod(mnt+"/"+name, mode|0o600, 0))
		if st := lstat(t, host+"/"+name); st.Mode != mode|0o600 || st.Rdev != 0 {
			t.Errorf("%s is %o of %x", name, st.Mode, st.Rdev)
		}
	}
	for name, mode := range map[string]uint32{"block": unix.S_IFBLK, "char": unix.S_IFCHR} {
		if err := unix.Mknod(mnt+"/"+name, mode|0o600, int(unix.Mkdev(1, 3))); !errors.Is(err, unix.EPERM) {
			t.Errorf("mknod %s: %v", name, err)
		}
	}
	if err := unix.Mknod(mnt+"/block0", unix.S_IFBLK|0o600, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("mknod of block device 0:0: %v", err)
	}
}
