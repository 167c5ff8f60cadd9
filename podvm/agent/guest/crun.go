package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// errorMax bounds what is read of crun's messages, in bytes.
const errorMax = 4 << 10

// crun runs crun with a command, and returns its own message if it fails. files are its
// descriptors from 0 on, and so those of a process that it starts.
func (a *Agent) crun(ctx context.Context, files []*os.File, args ...string) error {
	log, err := os.CreateTemp(a.path("crun"), "log-")
	if err != nil {
		return err
	}
	defer os.Remove(log.Name())
	defer log.Close()
	manager := "cgroupfs"
	if a.o.NoCgroups {
		manager = "disabled"
	}
	argv := append([]string{a.sealed.path(), "--root=" + a.path("crun", "state"), "--cgroup-manager=" + manager, "--log=file:" + log.Name()}, args...)
	if files == nil {
		files = make([]*os.File, 3)
	}
	pid, ended, err := a.reaper.start(argv, []string{"PATH=" + searchPath}, files, nil)
	if err != nil {
		return err
	}
	// The agent is the last that the kernel may kill for lack of memory; what it starts is not. crun
	// passes this on to processes whose spec says nothing of it.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		slog.Warn("make crun killable", "err", err)
	}
	var e exit
	select {
	case e = <-ended:
	case <-ctx.Done():
		a.reaper.kill(pid, ended, unix.SIGKILL)
		<-ended
		return fmt.Errorf("crun %s: %w", args[0], context.Cause(ctx))
	}
	if e.code() == 0 {
		return nil
	}
	return crunError(args[0], log, e)
}

// sealed is a program in memory that nobody can write to, not even through a container's /proc/PID/exe.
type sealed struct{ file *os.File }

// seal copies a program. crun does the same in each call that does not begin with it sealed: it copies
// itself, and loads itself and its libraries twice.
// Source: cloned_binary.c of crun and runc (CVE-2019-5736).
func seal(program string) (s *sealed, err error) {
	from, err := os.Open(program)
	if err != nil {
		return nil, err
	}
	defer from.Close()
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(filepath.Base(program), flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3, where none is needed
		fd, err = unix.MemfdCreate(filepath.Base(program), flags)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	to := os.NewFile(uintptr(fd), program)
	defer func() {
		if err != nil {
			to.Close()
		}
	}()
	if _, err := io.Copy(to, from); err != nil {
		return nil, err
	}
	if err := to.Chmod(0o555); err != nil {
		return nil, err
	}
	// All four, or crun does not take it for sealed.
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return nil, fmt.Errorf("seal %s: %w", program, err)
	}
	return &sealed{to}, nil
}

// path is by what to run it.
func (s *sealed) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), s.file.Fd()) }

// release has the process of a container that crun created run its command: it waits for a byte in a
// FIFO, whose being there is what tells crun a created container from a running one. It is all that
// "crun start" does for a container without hooks, and takes a tenth of the time without its process.
// Source: libcrun_container_start of crun.
func (a *Agent) release(id string) error {
	path := a.path("crun", "state", id, "exec.fifo")
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("its process has ended: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", filepath.Base(path), err)
	}
	defer unix.Close(fd)
	if err := os.Remove(path); err != nil {
		return err
	}
	if _, err := unix.Write(fd, []byte{0}); err != nil {
		return fmt.Errorf("write to %s: %w", filepath.Base(path), err)
	}
	return nil
}

// crunError makes an error of what crun wrote.
func crunError(command string, log io.Reader, e exit) error {
	text, err := io.ReadAll(io.LimitReader(log, errorMax))
	if err != nil {
		return err
	}
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	message := logPrefix.ReplaceAllString(string(lines[len(lines)-1]), "")
	if message == "" {
		return fmt.Errorf("crun %s ended with code %d without a word", command, e.code())
	}
	return refusal{kindOf(message)}
}

// failure stands for a container's process that crun could not make. It is told when the container is
// started, as other runtimes do: to the kubelet a container that can't be created is yet to come, and
// one that could not be started has ended.
type failure struct {
	err error
	// end is the end of the process that never was.
	end func()
}

// failedCode is the exit code of such a process, as containerd has it.
const failedCode = 128

func newFailure(err error) (*failure, spawned) {
	if errdefs.IsFailedPrecondition(err) { // which at a start means that there was one before
		err = errors.New(err.Error())
	}
	ended := make(chan exit, 1)
	return &failure{err, sync.OnceFunc(func() { ended <- exit{failedCode << 8} })}, spawned{ended: ended}
}

// refusal is an error of crun's own, not of what it takes to run it.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

// logPrefix is a time that crun may write before its message.
var logPrefix = regexp.MustCompile(`^\S*\d\d:\d\d:\d\d\S* |^time="[^"]*" level=\S+ msg=`)

// notExecutable is crun's message for a command that is not there.
var notExecutable = regexp.MustCompile("executable file [`'\"](.*)[`'\"] not found in \\$PATH")

// kindOf finds the errdefs kind of a message. For commands that are not there it uses the words
// that the kubelet's users know.
func kindOf(message string) error {
	if m := notExecutable.FindStringSubmatch(message); m != nil {
		return fmt.Errorf("exec: %q: executable file not found in $PATH: %w", m[1], errdefs.ErrNotFound)
	}
	kind := error(errdefs.ErrUnknown)
	switch {
	case strings.Contains(message, "is not running"), strings.Contains(message, "does not exist"):
		kind = errdefs.ErrFailedPrecondition
	case strings.Contains(message, "No such file or directory"):
		kind = errdefs.ErrNotFound
	case strings.Contains(message, "No space left"), strings.Contains(message, "Cannot allocate memory"):
		kind = errdefs.ErrResourceExhausted
	case strings.Contains(message, "Invalid argument"), strings.Contains(message, "Permission denied"):
		kind = errdefs.ErrInvalidArgument
	}
	return fmt.Errorf("%s: %w", message, kind)
}

// readPID reads a pid file.
func readPID(file string) (int, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 0 {
		return 0, errors.New("crun wrote no pid to " + filepath.Base(file))
	}
	return pid, nil
}

// spawned is a process that crun started in a container.
type spawned struct {
	pid   int
	ended <-chan exit
}

// spawn runs crun with a command that starts a process, a container's or an exec's: args, then the
// options for its pid file and terminal, then rest. With tty, s gets the terminal.
func (a *Agent) spawn(ctx context.Context, dir string, tty bool, s *stdio, args, rest []string) (spawned, error) {
	defer s.started()
	pidFile := filepath.Join(dir, "pid")
	args = append(args, "--pid-file="+pidFile)
	defer a.reaper.begin()()
	var socket *consoleSocket
	if tty {
		var err error
		if socket, err = listenConsole(filepath.Join(dir, "tty")); err != nil {
			return spawned{}, err
		}
		defer socket.close()
		args = append(args, "--console-socket="+socket.path)
	}
	if err := a.crun(ctx, s.theirs, append(args, rest...)...); err != nil {
		return spawned{}, err
	}
	pid, err := readPID(pidFile)
	if err != nil {
		return spawned{}, err
	}
	p := spawned{pid, a.reaper.claim(pid)}
	if tty {
		// crun has connected and sent before it ended.
		if s.console, err = socket.receive(ctx); err != nil {
			a.reaper.kill(pid, p.ended, unix.SIGKILL)
			return spawned{}, err
		}
	}
	return p, nil
}
