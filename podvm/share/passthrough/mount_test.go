package passthrough

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"
)

func TestPosix(t *testing.T) {
	mnt, _ := mounted(t)
	for name, test := range posixtest.All {
		if name == "FcntlFlockLocksFile" { // go-fuse skips it: it wants POSIX locks to exclude their own process
			continue
		}
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(mnt, name)
			ok(t, os.Mkdir(dir, 0o755))
			test(t, dir)
		})
	}
}

func TestFiles(t *testing.T) {
	mnt, host := mounted(t)
	ok(t, os.WriteFile(mnt+"/a", []byte("first"), 0o640))
	content(t, host+"/a", "first")
	if st := lstat(t, host+"/a"); st.Mode != unix.S_IFREG|0o640 {
		t.Errorf("mode %o", st.Mode)
	}
	if there, here := lstat(t, host+"/a"), lstat(t, mnt+"/a"); there.Ino != here.Ino || there.Mtim != here.Mtim || there.Size != here.Size {
		t.Errorf("%+v is shown as %+v", there, here)
	}
	ok(t, os.Truncate(mnt+"/a", 2))
	content(t, host+"/a", "fi")
	ok(t, os.Link(mnt+"/a", mnt+"/hard"))
	if a, b := lstat(t, mnt+"/a"), lstat(t, mnt+"/hard"); a.Ino != b.Ino || b.Nlink != 2 {
		t.Errorf("a hard link is another file: %+v, %+v", a, b)
	}
	ok(t, os.Symlink("/etc/passwd", mnt+"/soft"))
	if got := must(os.Readlink(host + "/soft"))(t); got != "/etc/passwd" {
		t.Errorf("the symlink says %q", got)
	}
	ok(t, unix.Linkat(unix.AT_FDCWD, mnt+"/soft", unix.AT_FDCWD, mnt+"/soft2", 0))
	if st := lstat(t, host+"/soft2"); st.Mode&unix.S_IFMT != unix.S_IFLNK {
		t.Errorf("a hard link of a symlink is %o", st.Mode)
	}
	ok(t, os.Lchown(mnt+"/soft", 5, 6))
	if st := lstat(t, host+"/soft"); st.Uid != 5 || st.Gid != 6 {
		t.Errorf("the symlink is of %d:%d", st.Uid, st.Gid)
	}
	ok(t, os.Mkdir(mnt+"/dir", 0o700))
	ok(t, os.Rename(mnt+"/a", mnt+"/dir/b"))
	content(t, host+"/dir/b", "fi")
	if err := os.Remove(mnt + "/dir"); !errors.Is(err, unix.ENOTEMPTY) {
		t.Errorf("remove of a full directory: %v", err)
	}
	// The host's changes show.
	ok(t, os.WriteFile(host+"/new", []byte("from the host"), 0o644))
	content(t, mnt+"/new", "from the host")
}

func TestRenameFlags(t *testing.T) {
	mnt, host := mounted(t)
	ok(t, os.WriteFile(mnt+"/a", []byte("a"), 0o600))
	ok(t, os.WriteFile(mnt+"/b", []byte("b"), 0o600))
	rename := func(flags uint) error {
		return unix.Renameat2(unix.AT_FDCWD, mnt+"/a", unix.AT_FDCWD, mnt+"/b", flags)
	}
	if err := rename(unix.RENAME_NOREPLACE); !errors.Is(err, unix.EEXIST) {
		t.Errorf("RENAME_NOREPLACE: %v", err)
	}
	if err := rename(unix.RENAME_WHITEOUT); !errors.Is(err, unix.EINVAL) {
		t.Errorf("RENAME_WHITEOUT: %v", err)
	}
	ok(t, rename(unix.RENAME_EXCHANGE))
	content(t, host+"/a", "b")
	content(t, host+"/b", "a")
}

// TestAppend appends from two open files and a third that becomes one, while a mapping of one that
// appends writes where it is.
func TestAppend(t *testing.T) {
	mnt, host := mounted(t)
	open := func(flags int) *os.File {
		f := must(os.OpenFile(mnt+"/log", flags|os.O_CREATE, 0o600))(t)
		t.Cleanup(func() { f.Close() })
		return f
	}
	a, b, c := open(os.O_WRONLY|os.O_APPEND), open(os.O_WRONLY|os.O_APPEND), open(os.O_RDWR)
	must(unix.FcntlInt(c.Fd(), unix.F_SETFL, unix.O_APPEND))(t)
	var want strings.Builder
	for range 100 {
		for name, f := range map[string]*os.File{"a": a, "b": b, "c": c} {
			must(f.WriteString(name + "\n"))(t)
			want.WriteString(name + "\n")
		}
		// The host appends too, which the guest's idea of the size does not have yet.
		h := must(os.OpenFile(host+"/log", os.O_WRONLY|os.O_APPEND, 0))(t)
		must(h.WriteString("h\n"))(t)
		h.Close()
		want.WriteString("h\n")
	}
	content(t, host+"/log", want.String())
	must(unix.FcntlInt(b.Fd(), unix.F_SETFL, 0))(t)
	must(unix.Pwrite(int(b.Fd()), []byte("B"), 2))(t)
	got := must(os.ReadFile(host + "/log"))(t)
	if len(got) != want.Len() || got[2] != 'B' {
		t.Errorf("a write where it says went elsewhere: %.10q of %d bytes", got, len(got))
	}
}

func TestMmap(t *testing.T) {
	mnt, host := mounted(t)
	big := "begin" + strings.Repeat("-", 1<<20-8) + "end"
	ok(t, os.WriteFile(host+"/file", []byte(big), 0o600))
	startChild(t, "mmap", mnt+"/file").end()
	content(t, host+"/file", "BEGIN"+big[5:])
}

func TestHoles(t *testing.T) {
	mnt, _ := mounted(t)
	f := must(os.Create(mnt + "/sparse"))(t)
	defer f.Close()
	must(f.WriteAt([]byte("end"), 1<<20))(t)
	if at := must(unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA))(t); at != 1<<20 {
		t.Errorf("data begins at %d", at)
	}
	if at := must(unix.Seek(int(f.Fd()), 1<<20, unix.SEEK_HOLE))(t); at != 1<<20+3 {
		t.Errorf("the hole at the end begins at %d", at)
	}
	ok(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<20, 4096))
	if _, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA); !errors.Is(err, unix.ENXIO) {
		t.Errorf("data after it was punched out: %v", err)
	}
}

func TestCopyFileRange(t *testing.T) {
	mnt, host := mounted(t)
	text := strings.Repeat("0123456789", 100_000)
	ok(t, os.WriteFile(mnt+"/from", []byte(text), 0o600))
	from, to := must(os.Open(mnt+"/from"))(t), must(os.Create(mnt+"/to"))(t)
	defer from.Close()
	defer to.Close()
	src, dst := int64(10), int64(0)
	for src < int64(len(text)) {
		if n := must(unix.CopyFileRange(int(from.Fd()), &src, int(to.Fd()), &dst, len(text), 0))(t); n == 0 {
			break
		}
	}
	content(t, host+"/to", text[10:])
}

func TestRemovedButOpen(t *testing.T) {
	mnt, host := mounted(t)
	f := must(os.Create(mnt + "/gone"))(t)
	defer f.Close()
	ok(t, os.Remove(mnt+"/gone"))
	if _, err := os.Lstat(host + "/gone"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is there: %v", err)
	}
	must(f.WriteString("still"))(t)
	ok(t, f.Truncate(3))
	ok(t, f.Chmod(0o600))
	if st := must(f.Stat())(t); st.Size() != 3 || st.Mode().Perm() != 0o600 {
		t.Errorf("it is %v", st)
	}
}

func TestTmpfileLinked(t *testing.T) {
	mnt, host := mounted(t)
	fd := must(unix.Open(mnt, unix.O_TMPFILE|unix.O_RDWR, 0o600))(t)
	defer unix.Close(fd)
	must(unix.Write(fd, []byte("named at last")))(t)
	ok(t, unix.Linkat(unix.AT_FDCWD, procPath(fd), unix.AT_FDCWD, mnt+"/name", unix.AT_SYMLINK_FOLLOW))
	content(t, host+"/name", "named at last")
}

func TestXattr(t *testing.T) {
	mnt, host := mounted(t)
	ok(t, os.WriteFile(mnt+"/file", nil, 0o600))
	ok(t, os.Mkdir(mnt+"/dir", 0o700))
	ok(t, os.Symlink("file", mnt+"/link"))
	for _, name := range []string{"file", "dir", "link"} {
		attr := "user.test"
		if name == "link" {
			attr = "trusted.test" // symlinks have no others
		}
		value := bytes.Repeat([]byte("v"), 200)
		path := filepath.Join(mnt, name)
		ok(t, unix.Lsetxattr(path, attr, value, unix.XATTR_CREATE))
		if err := unix.Lsetxattr(path, attr, value, unix.XATTR_CREATE); !errors.Is(err, unix.EEXIST) {
			t.Errorf("%s: XATTR_CREATE of one that is there: %v", name, err)
		}
		buf := make([]byte, 300)
		n := must(unix.Lgetxattr(filepath.Join(host, name), attr, buf))(t)
		if !bytes.Equal(buf[:n], value) {
			t.Errorf("%s: on the host it is %q", name, buf[:n])
		}
		if n := must(unix.Lgetxattr(path, attr, nil))(t); n != len(value) {
			t.Errorf("%s: its size is %d", name, n)
		}
		if _, err := unix.Lgetxattr(path, attr, buf[:10]); !errors.Is(err, unix.ERANGE) {
			t.Errorf("%s: into less than it is: %v", name, err)
		}
		n = must(unix.Llistxattr(path, buf))(t)
		if string(buf[:n]) != attr+"\x00" {
			t.Errorf("%s: the list is %q", name, buf[:n])
		}
		ok(t, unix.Lremovexattr(path, attr))
		if _, err := unix.Lgetxattr(path, attr, buf); !errors.Is(err, unix.ENODATA) {
			t.Errorf("%s: after its removal: %v", name, err)
		}
	}
}

func TestTimes(t *testing.T) {
	mnt, host := mounted(t)
	ok(t, os.WriteFile(mnt+"/file", nil, 0o600))
	old := []unix.Timespec{{Sec: -5, Nsec: 7}, {Sec: 1 << 31, Nsec: 9}}
	ok(t, unix.UtimesNanoAt(unix.AT_FDCWD, mnt+"/file", old, 0))
	if st := lstat(t, host+"/file"); st.Atim != old[0] || st.Mtim != old[1] {
		t.Errorf("times are %v, %v", st.Atim, st.Mtim)
	}
	if st := lstat(t, mnt+"/file"); st.Atim != old[0] || st.Mtim != old[1] {
		t.Errorf("times are shown as %v, %v", st.Atim, st.Mtim)
	}
	ok(t, unix.UtimesNanoAt(unix.AT_FDCWD, mnt+"/file", []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_NOW}}, 0))
	if st := lstat(t, host+"/file"); st.Atim != old[0] || st.Mtim.Sec == old[1].Sec {
		t.Errorf("times are %v, %v", st.Atim, st.Mtim)
	}
}

// TestMountInside has a mount in the share: its inode numbers must not be another's.
func TestMountInside(t *testing.T) {
	mnt, host := mounted(t)
	ok(t, os.Mkdir(host+"/other", 0o755))
	ok(t, unix.Mount("tmpfs", host+"/other", "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { ok(t, unix.Unmount(host+"/other", unix.MNT_DETACH)) })
	ok(t, os.WriteFile(mnt+"/other/file", []byte("inside"), 0o600))
	content(t, host+"/other/file", "inside")
	st := lstat(t, mnt+"/other/file")
	if st.Ino == lstat(t, host+"/other/file").Ino || st.Ino>>63 == 0 {
		t.Errorf("inode %x of another device", st.Ino)
	}
	entries := must(os.ReadDir(mnt + "/other"))(t)
	if len(entries) != 1 || entries[0].Name() != "file" {
		t.Errorf("it has %v", entries)
	}
}
