package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/share"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// shareArg makes the test's binary the process that serves host directories.
const shareArg = "share-under-test"

// sharing is a pod, whose agent is under test, with directories of the host.
type sharing struct {
	*testing.T
	ctx    context.Context
	client *agent.Client
	guest  agent.Dialer
	server *share.Server
	run    string // runtime folder
}

// relayed are streams that the daemon has to relay, as those of a serial port.
type relayed struct{ agent.Dialer }

func (r relayed) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	c, err := r.Dialer.Dial(ctx, port)
	return struct{ net.Conn }{c}, err
}

// eachChannel runs a test with both kinds of streams.
func eachChannel(t *testing.T, test func(s *sharing)) {
	for name, wrap := range map[string]func(agent.Dialer) agent.Dialer{
		"handed over": func(d agent.Dialer) agent.Dialer { return d },
		"relayed":     func(d agent.Dialer) agent.Dialer { return relayed{d} },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, client, dial := dialAgent(t)
			if _, err := service1(t, ctx, client).Setup(ctx, setupRequest()); err != nil {
				t.Fatal(err)
			}
			s := &sharing{T: t, ctx: ctx, client: client, guest: wrap(dial), run: t.TempDir()}
			s.restart()
			t.Cleanup(func() {
				if err := s.server.Release(context.Background(), s.run); err != nil {
					t.Error(err)
				}
			})
			test(s)
		})
	}
}

// restart is what a daemon that starts anew has: it knows of nothing.
func (s *sharing) restart() {
	if s.server != nil {
		s.server.Close()
	}
	s.server = share.New("/proc/self/exe", shareArg)
}

func (s *sharing) share(d share.Dir) {
	s.Helper()
	if err := s.tryShare(d); err != nil {
		s.Fatal(err)
	}
}

func (s *sharing) tryShare(d share.Dir) error {
	return s.server.Share(s.ctx, share.Pod{ID: "pod", Dir: s.run, Guest: s.guest}, d)
}

// container runs a script in a container that has the directory at /host.
func (s *sharing) container(id, script string, d share.Dir, options ...string) *run {
	s.Helper()
	r, _ := create(s.T, s.ctx, s.client, id, specOf("sh", "-c", script), &agent.CreateRequest{
		Mounts: []*agent.Mount{{Destination: "/host", Options: options, Source: &agent.Mount_Share{Share: &agent.Share{Tag: d.Tag}}}},
	})
	return r.start()
}

// result is the container's exit code, and what it said.
func (s *sharing) result(r *run) (code int32, stdout, stderr string) {
	s.Helper()
	stdout, stderr = r.logs()
	return r.wait().ExitCode, stdout, stderr
}

// until waits for what has no event of its own: a file of the host that grows.
func (s *sharing) until(holds func() bool) {
	s.Helper()
	for !holds() {
		if s.ctx.Err() != nil {
			s.Fatal("it does not come to that")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (s *sharing) dir() share.Dir {
	dir, err := filepath.EvalSymlinks(s.TempDir())
	if err != nil {
		s.Fatal(err)
	}
	return share.Dir{Tag: "d", Path: dir}
}

func (s *sharing) write(path, content string) {
	s.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		s.Fatal(err)
	}
}

func (s *sharing) process() *process.Process {
	s.Helper()
	p, err := process.Load(filepath.Join(s.run, "share"))
	if err != nil {
		s.Fatal(err)
	}
	return p
}

func TestShare(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		d := s.dir()
		s.write(filepath.Join(d.Path, "from-host"), "hello\n")
		s.share(d)
		s.share(d) // served already
		r := s.container("a", "cat /host/from-host; echo back > /host/from-guest; mkdir /host/dir; ls /host", d)
		if code, out, _ := s.result(r); code != 0 || out != "hello\ndir\nfrom-guest\nfrom-host\n" {
			s.Errorf("exit %d, %q", code, out)
		}
		if b, err := os.ReadFile(filepath.Join(d.Path, "from-guest")); err != nil || string(b) != "back\n" {
			s.Errorf("the host has %q, %v", b, err)
		}
		again := s.container("b", "cat /host/from-guest", d)
		if code, out, _ := s.result(again); code != 0 || out != "back\n" {
			s.Errorf("another container: exit %d, %q", code, out)
		}
	})
}

// TestShareOutlivesDaemon has a container write all the time while daemons come and go.
func TestShareOutlivesDaemon(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		d := s.dir()
		s.share(d)
		r := s.container("a", `exec 3>/host/log; i=0; while [ ! -e /host/stop ]; do i=$((i+1)); echo $i >&3 || exit 1; done; echo $i`, d)
		log := filepath.Join(d.Path, "log")
		for range 5 {
			before := size(s.T, log)
			s.until(func() bool { return size(s.T, log) > before+1000 })
			s.restart()
			s.share(d)
		}
		s.write(filepath.Join(d.Path, "stop"), "")
		code, out, _ := s.result(r)
		lines, err := os.ReadFile(log)
		if err != nil {
			s.Fatal(err)
		}
		var want strings.Builder
		for i := 1; fmt.Sprintln(i-1) != out; i++ {
			fmt.Fprintln(&want, i)
		}
		if code != 0 || string(lines) != want.String() {
			s.Errorf("exit %d after %s lines; the file has %d bytes, want %d", code, strings.TrimSpace(out), len(lines), want.Len())
		}
	})
}

func size(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// TestShareProcessDies shows that what was open is lost with an error, and that containers which come find
// the directory.
func TestShareProcessDies(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		d := s.dir()
		s.share(d)
		r := s.container("a", `exec 3>/host/open; echo first >&3; until [ -e /tmp/never ]; do echo more >&3 || exit 7; done 2>/dev/null`, d)
		s.until(func() bool { return size(s.T, filepath.Join(d.Path, "open")) > 100 })
		first := s.process()
		if err := first.Kill(s.ctx); err != nil {
			s.Fatal(err)
		}
		if code, _, _ := s.result(r); code != 7 {
			s.Errorf("the container's writes ended with %d", code)
		}
		s.share(d)
		if now := s.process(); now.PID() == first.PID() {
			s.Error("the process is the one that was killed")
		}
		again := s.container("b", "echo new > /host/new", d)
		if code, _, stderr := s.result(again); code != 0 {
			s.Errorf("another container: exit %d, %s", code, stderr)
		}
	})
}

func TestShareReadOnly(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		d := s.dir()
		d.ReadOnly, d.Recursive, d.Follow = true, true, true
		mountTmpfs(s.T, d.Path)
		s.write(filepath.Join(d.Path, "file"), "kept\n")
		below := filepath.Join(d.Path, "below")
		if err := os.Mkdir(below, 0o755); err != nil {
			s.Fatal(err)
		}
		s.share(d)
		mountTmpfs(s.T, below)
		s.write(filepath.Join(below, "later"), "seen\n")
		r := s.container("a", "cat /host/file /host/below/later; echo x >> /host/file; echo x > /host/new; rm /host/file; chmod 777 /host/file; echo x > /host/below/new; true", d)
		if code, out, _ := s.result(r); code != 0 || out != "kept\nseen\n" {
			s.Errorf("exit %d, %q", code, out)
		}
		for _, name := range []string{"new", "below/new"} {
			if _, err := os.Lstat(filepath.Join(d.Path, name)); err == nil {
				s.Errorf("the guest has made %s", name)
			}
		}
		if b, err := os.ReadFile(filepath.Join(d.Path, "file")); err != nil || string(b) != "kept\n" {
			s.Errorf("the file is %q, %v", b, err)
		}
	})
}

// TestShareReadOnlyAlone shows that what is mounted below a directory that is read-only is not.
func TestShareReadOnlyAlone(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		d := s.dir()
		d.ReadOnly = true
		below := filepath.Join(d.Path, "below")
		if err := os.Mkdir(below, 0o755); err != nil {
			s.Fatal(err)
		}
		mountTmpfs(s.T, below)
		s.write(filepath.Join(d.Path, "file"), "")
		s.share(d)
		r := s.container("a", "echo x > /host/below/file && { echo x > /host/new; rm /host/file; chmod 600 /host/file; touch /host/file; } 2>&1 | wc -l", d)
		if code, out, errs := s.result(r); code != 0 || strings.TrimSpace(out) != "4" {
			s.Errorf("exit %d, %s of 4 writes refused, %s", code, out, errs)
		}
		if b, err := os.ReadFile(filepath.Join(below, "file")); err != nil || string(b) != "x\n" {
			s.Errorf("below it is %q, %v", b, err)
		}
	})
}

// TestSharePropagation shows what containers see of mounts that the host makes later.
func TestSharePropagation(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		follows := s.dir()
		mountTmpfs(s.T, follows.Path)
		stays := share.Dir{Tag: "stays", Path: follows.Path}
		follows.Follow = true
		below := filepath.Join(follows.Path, "below")
		if err := os.Mkdir(below, 0o755); err != nil {
			s.Fatal(err)
		}
		s.share(follows)
		s.share(stays)
		mountTmpfs(s.T, below)
		s.write(filepath.Join(below, "file"), "")
		for d, want := range map[share.Dir]string{follows: "file\n", stays: ""} {
			if code, out, _ := s.result(s.container("c-"+d.Tag, "ls /host/below", d)); code != 0 || out != want {
				s.Errorf("%s: exit %d, %q", d.Tag, code, out)
			}
		}
	})
}

// TestShareForgets shows that the host can unmount what a guest that follows has only looked at.
func TestShareForgets(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		d := s.dir()
		mountTmpfs(s.T, d.Path)
		d.Follow = true
		below := filepath.Join(d.Path, "below")
		if err := os.Mkdir(below, 0o755); err != nil {
			s.Fatal(err)
		}
		s.share(d)
		if err := unix.Mount("tmpfs", below, "tmpfs", 0, ""); err != nil {
			s.Fatal(err)
		}
		s.write(filepath.Join(below, "file"), "seen\n")
		if code, out, _ := s.result(s.container("a", "cat /host/below/file; stat /host/below/file >/dev/null", d)); code != 0 || out != "seen\n" {
			s.Fatalf("exit %d, %q", code, out)
		}
		s.until(func() bool {
			err := unix.Unmount(below, 0)
			if err != nil && !errors.Is(err, unix.EBUSY) {
				s.Fatal(err)
			}
			return err == nil
		})
		if code, out, _ := s.result(s.container("b", "ls /host/below", d)); code != 0 || out != "" {
			s.Errorf("after the unmount: exit %d, %q", code, out)
		}
	})
}

// TestShareConfined shows what the process has.
func TestShareConfined(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		d := s.dir()
		s.share(d)
		pid := s.process().PID()
		root := fmt.Sprintf("/proc/%d/root", pid)
		entries, err := os.ReadDir(root)
		if err != nil {
			s.Fatal(err)
		}
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		if fmt.Sprint(names) != "[d proc]" {
			s.Errorf("its root holds %v", names)
		}
		if _, err := os.Lstat(filepath.Join(root, "proc/sys")); err == nil {
			s.Error("it has a /proc/sys")
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			s.Fatal(err)
		}
		for _, want := range []string{"NoNewPrivs:\t1\n", "CapPrm:\t00000000800000db\n", "CapEff:\t00000000800000db\n"} {
			if !strings.Contains(string(status), want) {
				s.Errorf("its status has no %q:\n%s", want, status)
			}
		}
		for _, ns := range []string{"mnt", "pid", "net", "ipc", "uts"} {
			ours, err1 := os.Readlink("/proc/self/ns/" + ns)
			its, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
			if err := errors.Join(err1, err2); err != nil || ours == its {
				s.Errorf("namespace %s: %v, it has %s", ns, err, its)
			}
		}
	})
}

// TestShareReleased shows that nothing of a pod that is released holds a file system of the host.
func TestShareReleased(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		d := s.dir()
		if err := unix.Mount("tmpfs", d.Path, "tmpfs", 0, ""); err != nil {
			s.Fatal(err)
		}
		inner := filepath.Join(d.Path, "mounted")
		if err := os.Mkdir(inner, 0o755); err != nil {
			s.Fatal(err)
		}
		s.share(d)
		p := s.process()
		s.restart() // a daemon that knows nothing of it
		for range 2 {
			if err := s.server.Release(s.ctx, s.run); err != nil {
				s.Fatal(err)
			}
		}
		select {
		case <-p.Done():
		case <-s.ctx.Done():
			s.Error("its process runs")
		}
		if err := unix.Unmount(d.Path, 0); err != nil {
			s.Error(err)
		}
	})
}

func TestShareWhatIsNotThere(t *testing.T) {
	eachChannel(t, func(s *sharing) {
		private := s.dir()
		private.Follow = true
		if err := unix.Mount("tmpfs", private.Path, "tmpfs", 0, ""); err != nil {
			s.Fatal(err)
		}
		defer unix.Unmount(private.Path, unix.MNT_DETACH)
		if err := unix.Mount("", private.Path, "", unix.MS_PRIVATE, ""); err != nil {
			s.Fatal(err)
		}
		if err := s.tryShare(private); !errors.Is(err, errdefs.ErrFailedPrecondition) {
			s.Errorf("a mount that can't be followed: %v", err)
		}
		err := s.tryShare(share.Dir{Tag: "d", Path: filepath.Join(s.TempDir(), "missing")})
		if !errors.Is(err, os.ErrNotExist) {
			s.Errorf("a directory that is missing: %v", err)
		}
		d := s.dir()
		s.share(d)
		link := filepath.Join(s.TempDir(), "link")
		if err := os.Symlink(d.Path, link); err != nil {
			s.Fatal(err)
		}
		if err := s.tryShare(share.Dir{Tag: "l", Path: link}); !errors.Is(err, unix.ELOOP) {
			s.Errorf("a link: %v", err)
		}
	})
}

// mountTmpfs mounts a file system that passes on what is mounted below it.
func mountTmpfs(t *testing.T, at string) {
	t.Helper()
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", at, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}
