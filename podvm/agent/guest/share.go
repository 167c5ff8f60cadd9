package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// hostDirs are the directories of the host that the guest sees. Each is a FUSE file system: the kernel's
// requests go to the host over a link, and its replies come back.
type hostDirs struct {
	dir string

	mu    sync.Mutex
	byTag map[string]*hostDir
}

type hostDir struct {
	dir string
	// turn holds a token: who has it may mount.
	turn chan struct{}
	// session is the host's, served tells that it is mounted. They belong to who has the turn.
	session uint64
	served  bool
	link    *agent.Link
	kernel  *os.File // the kernel's end, /dev/fuse
	notices *notices
}

func newHostDirs(dir string) *hostDirs { return &hostDirs{dir: dir, byTag: make(map[string]*hostDir)} }

// share serves a stream of the host to a directory's file system.
func (a *Agent) share(c net.Conn, h agent.Header) error {
	s, err := a.shares.get(h.Tag)
	if err != nil {
		return refuse(c, err)
	}
	link, deliver, err := s.connect(h.Session)
	if err != nil {
		return refuse(c, fmt.Errorf("mount a host directory: %w", err))
	}
	if err := agent.WriteMessage(c, agent.Reply{Received: link.Received()}); err != nil {
		link.Leave()
		return err
	}
	return link.Run(c, h.Received, deliver)
}

func (s *hostDirs) get(tag string) (*hostDir, error) {
	if tag == "" || strings.ContainsRune(tag, '/') || !filepath.IsLocal(tag) {
		return nil, fmt.Errorf("host directory with the tag %q: %w", tag, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	one := s.byTag[tag]
	if one == nil {
		one = &hostDir{dir: filepath.Join(s.dir, tag), turn: make(chan struct{}, 1)}
		one.turn <- struct{}{}
		s.byTag[tag] = one
	}
	return one, nil
}

// connect returns the link of the session, with its turn taken, and who takes what comes by it. A session
// that is new takes the place of the one before: what is open there is lost, and fails with ENOTCONN.
func (s *hostDir) connect(session uint64) (*agent.Link, agent.Deliver, error) {
	<-s.turn
	defer func() { s.turn <- struct{}{} }()
	if !s.served || s.session != session {
		if err := s.drop(); err != nil {
			return nil, nil, err
		}
		if err := s.mount(session); err != nil {
			return nil, nil, err
		}
	}
	s.link.Take()
	kernel, notices := s.kernel, s.notices
	return s.link, func(_ context.Context, message []byte) error {
		if agent.IsNotification(message) {
			notices.add(message)
			return nil
		}
		return answer(kernel, message)
	}, nil
}

func (s *hostDir) drop() error {
	if !s.served {
		return nil
	}
	slog.Warn("a host directory is served anew: what was open in it is lost", "path", s.dir)
	s.served = false
	s.link.Close()
	// By force first: a notification that waits would keep the file open.
	return errors.Join(unix.Unmount(s.dir, unix.MNT_FORCE|unix.MNT_DETACH), s.kernel.Close())
}

// fuseDevice is where the kernel hands out requests.
const fuseDevice = "/dev/fuse"

// hostDirFlags are how a host directory is mounted.
const hostDirFlags = unix.MS_NODEV

func (s *hostDir) mount(session uint64) error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	fd, err := unix.Open(fuseDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", fuseDevice, err)
	}
	// Who may do what is decided here, by modes and owners; all users of the pod see it.
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", fd)
	if err := unix.Mount("caisson", s.dir, "fuse", hostDirFlags, options); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	kernel := os.NewFile(uintptr(fd), fuseDevice) // not before: the poller would not learn of requests
	s.session, s.served, s.link, s.kernel = session, true, agent.NewLink(), kernel
	s.notices = &notices{dir: s.dir, kernel: kernel}
	go pump(kernel, s.link)
	return nil
}

// pump passes the kernel's requests on until the file system is gone.
func pump(kernel *os.File, link *agent.Link) {
	buffer := make([]byte, agent.MessageMax)
	for {
		n, err := kernel.Read(buffer)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINTR): // the request was taken back
			continue
		case err != nil: // unmounted, or dropped
			return
		}
		if link.Send(append([]byte(nil), buffer[:n]...)) != nil {
			return
		}
	}
}

// answer gives the kernel a reply.
func answer(kernel *os.File, reply []byte) error {
	_, err := kernel.Write(reply)
	if errors.Is(err, unix.ENOENT) { // nobody waits for it any more
		return nil
	}
	if err != nil && !errors.Is(err, os.ErrClosed) {
		slog.Warn("a reply of the host's file system", "bytes", len(reply), "err", err)
	}
	return nil
}

// use returns where a directory of the host is mounted.
func (s *hostDirs) use(ctx context.Context, tag string) (string, error) {
	one, err := s.get(tag)
	if err != nil {
		return "", err
	}
	select {
	case <-one.turn:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { one.turn <- struct{}{} }()
	if !one.served {
		return "", fmt.Errorf("the host serves no directory with the tag %s: %w", tag, errdefs.ErrFailedPrecondition)
	}
	return one.dir, nil
}
