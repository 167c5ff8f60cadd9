package passthrough

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// childEnv has the test's binary do one thing in a process of its own.
const childEnv = "CAISSON_PASSTHROUGH_CHILD"

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		if err := child(what, os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child does what a process of the guest or host does with a file.
func child(what, path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	switch what {
	case "mmap":
		// The kernel writes pages back by any handle that is open to write.
		appending, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		defer appending.Close()
		return mapped(int(f.Fd()))
	case "posix":
		err = unix.FcntlFlock(f.Fd(), unix.F_SETLK, &lock)
	case "posix-wait":
		fmt.Println("about to")
		err = unix.FcntlFlock(f.Fd(), unix.F_SETLKW, &lock)
	case "ofd":
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock)
	case "ofd-wait":
		fmt.Println("about to")
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &lock)
	case "flock":
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	case "flock-wait":
		fmt.Println("about to")
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return err
	}
	fmt.Println("locked")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// mapped changes the first byte by a mapping. It runs on its own: a thread of the server that waits
// for a page could keep the runtime from serving it.
func mapped(fd int) error {
	m, err := unix.Mmap(fd, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	if string(m[:5]) != "begin" || string(m[1<<20-3:]) != "end" {
		return errors.New("the mapping is not the file")
	}
	copy(m, "BEGIN")
	if err := unix.Msync(m, unix.MS_SYNC); err != nil {
		return err
	}
	return unix.Munmap(m)
}

type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	lines *bufio.Scanner
	stdin io.Closer
}

// startChild starts a process. None of its caller's files may be of a mount: they are closed in the
// child while this process waits, which may be when it has to serve that.
func startChild(t *testing.T, what, path string) *process {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", path)
	cmd.Env = append(os.Environ(), childEnv+"="+what)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{t, cmd, bufio.NewScanner(out), stdin}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return p
}

func (p *process) says(want string) {
	p.t.Helper()
	if !p.lines.Scan() || p.lines.Text() != want {
		p.t.Fatalf("the child says %q; want %q", p.lines.Text(), want)
	}
}

func (p *process) end() {
	p.t.Helper()
	p.stdin.Close()
	if err := p.cmd.Wait(); err != nil {
		p.t.Fatal(err)
	}
}

// serveDir serves a new directory. When the test ends no descriptor may be left.
func serveDir(t testing.TB, host string) *FS {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	root, err := os.OpenFile(host, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := New(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		if used := f.budget.used.Load(); used != 0 {
			t.Errorf("%d descriptors are left open", used)
		}
		if locked := f.locks.ranges.Load(); locked != 0 {
			t.Errorf("%d ranges are left locked", locked)
		}
		if left := f.Crossings(); len(left) != 0 {
			t.Errorf("the crossings %v are left", left)
		}
		if kept := f.kept.size.Load(); kept != 0 {
			t.Errorf("%d bytes of directories are left", kept)
		}
	})
	return f
}

// tempDir is a directory that other users may enter.
func tempDir(t testing.TB) string {
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// mounted serves a new directory to this kernel in place of a guest's.
func mounted(t testing.TB) (mnt, host string) {
	t.Helper()
	mnt, host, _, _ = mountedFS(t)
	return mnt, host
}

func mountedFS(t testing.TB) (mnt, host string, f *FS, server *fuse.Server) {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("needs /dev/fuse to mount what is served: %v", err)
	}
	host, mnt = tempDir(t), tempDir(t)
	f = serveDir(t, host)
	o := f.Options()
	o.DirectMountStrict, o.AllowOther, o.Options = true, true, []string{"default_permissions"}
	o.DirectMountFlags = unix.MS_NODEV // with set-user-ID
	server, err := fuse.NewServer(f, mnt, o)
	if err != nil {
		t.Fatalf("mount: %v", err)
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(mnt, unix.MNT_DETACH|unix.MNT_FORCE)
		}
	})
	return mnt, host, f, server
}

// asUser does something as a user without privileges.
func asUser(uid, gid uint32, do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good
		fsgid(gid)
		fsuid(uid)
		done <- do()
	}()
	return <-done
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// lstat is of the host's file system.
func lstat(t testing.TB, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("lstat %s: %v", path, err)
	}
	return st
}

func content(t testing.TB, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s has %.40q (%d bytes); want %.40q (%d)", path, got, len(got), want, len(want))
	}
}
