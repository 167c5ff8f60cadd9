package share

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// controlFD is the descriptor of the socket that requests come to.
const controlFD = 3

// processName is what ps and the kernel's messages call the process; its arguments have the pod's id.
const processName = "caissond-share"

// Serve is the process that a Server starts. It gives up whatever it does not need to serve the
// directories that it is given, and serves them until it is killed.
func Serve() error {
	if err := os.WriteFile("/proc/self/comm", []byte(processName), 0); err != nil {
		return err
	}
	f := os.NewFile(controlFD, "control")
	l, err := net.FileListener(f)
	if err != nil {
		return fmt.Errorf("descriptor %d: %w", controlFD, err)
	}
	f.Close()
	control, ok := l.(*net.UnixListener)
	if !ok {
		return fmt.Errorf("descriptor %d is no unix socket", controlFD)
	}
	// Not before it is asked: until its identity was saved, it is known by the folder that it works in.
	conn, err := control.AcceptUnix()
	if err != nil {
		return err
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	log.SetOutput(io.Discard) // what the protocol's library says of requests that a guest malformed
	if err := confine(); err != nil {
		reply(conn, response{Reply: agent.ReplyTo(fmt.Errorf("confine itself: %w", err))})
		return err
	}
	all := sessions{byTag: map[string]*session{}}
	if err := all.relieve(); err != nil {
		reply(conn, response{Reply: agent.ReplyTo(err)})
		return err
	}
	for {
		go all.handle(conn)
		conn, err = control.AcceptUnix()
		for errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED) {
			time.Sleep(acceptPause) // until a guest closes something
			conn, err = control.AcceptUnix()
		}
		if err != nil {
			return err
		}
	}
}

// sessions are the directories that the process serves.
type sessions struct {
	mu    sync.Mutex
	byTag map[string]*session
}

// acceptPause is how long the process waits for a descriptor that it lacks.
const acceptPause = 100 * time.Millisecond

// joinLimit bounds how long a guest may take to mount a directory.
const joinLimit = 30 * time.Second

func (s *sessions) handle(conn *net.UnixConn) {
	defer conn.Close()
	q, stream, err := accept(conn)
	if err != nil {
		slog.Error("read a request", "err", err)
		return
	}
	if stream == nil {
		reply(conn, s.state(q.Tag))
		return
	}
	reply(conn, response{Reply: agent.ReplyTo(s.join(q, stream))})
}

func reply(conn net.Conn, r response) {
	if err := agent.WriteMessage(conn, r); err != nil {
		slog.Error("answer a request", "err", err)
	}
}

func (s *sessions) state(tag string) response {
	s.mu.Lock()
	one := s.byTag[tag]
	s.mu.Unlock()
	if one == nil {
		return response{Placed: placed(tag)}
	}
	return response{Placed: true, Connected: one.link.Connected() && !one.relayed.Load()}
}

// placed tells whether the daemon has mounted a directory: it may have died before it said so.
func placed(tag string) bool {
	var root, dir unix.Statx_t
	err := errors.Join(unix.Statx(unix.AT_FDCWD, "/", 0, unix.STATX_MNT_ID, &root), unix.Statx(unix.AT_FDCWD, "/"+tag, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &dir))
	return err == nil && root.Mnt_id != dir.Mnt_id
}

// join serves a directory on a stream of the guest's agent.
func (s *sessions) join(q request, stream *os.File) error {
	conn, err := net.FileConn(stream)
	if err = errors.Join(err, stream.Close()); err != nil {
		return err
	}
	one, err := s.open(q)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	ctx, cancel := context.WithTimeout(context.Background(), joinLimit)
	defer cancel()
	one.link.Take()
	one.relayed.Store(q.Relayed)
	got, err := agent.Handshake(ctx, conn, agent.Header{Kind: agent.KindShare, Tag: q.Tag, Session: one.id, Received: one.link.Received()})
	if err != nil {
		one.link.Leave()
		return errors.Join(err, conn.Close())
	}
	go func() {
		if err := one.link.Run(conn, got.Received, one.deliver); err != nil {
			// Once: the guest decides how often it does that.
			one.told.Do(func() { slog.Error("a guest breaks the rules", "tag", q.Tag, "err", err) })
		}
	}()
	return nil
}

// open finds the session of a directory, or begins it.
func (s *sessions) open(q request) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if one := s.byTag[q.Tag]; one != nil {
		return one, nil
	}
	fd, err := unix.Open("/"+q.Tag, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the directory %s: %w", q.Tag, err)
	}
	one, err := newSession(os.NewFile(uintptr(fd), q.Tag), q.ReadOnly)
	if err != nil {
		return nil, err
	}
	s.byTag[q.Tag] = one
	if q.Forget {
		go one.forget()
	}
	return one, nil
}
