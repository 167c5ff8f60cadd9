package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/caisson-vm/caisson/podvm/agent"
	"golang.org/x/sys/unix"
)

// noticesMax bounds the notifications of a host directory that wait. What is more is dropped: the host
// repeats what had no effect.
const noticesMax = 4096

// notices are notifications for a host directory's file system. With one of a name the kernel waits for who
// uses its directory, and they may be waiting for a reply: replies must not wait for that.
type notices struct {
	dir    string
	kernel *os.File

	mu      sync.Mutex
	waiting [][]byte
	busy    bool
}

func (n *notices) add(message []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.waiting) >= noticesMax {
		return
	}
	n.waiting = append(n.waiting, message)
	if !n.busy {
		n.busy = true
		go n.work()
	}
}

// next is nil when there are no more.
func (n *notices) next() []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.waiting) == 0 {
		n.waiting, n.busy = nil, false
		return nil
	}
	message := n.waiting[0]
	n.waiting = n.waiting[1:]
	return message
}

func (n *notices) work() {
	for m := n.next(); m != nil; m = n.next() {
		err := n.give(m)
		// ENOENT: the kernel does not know the name that it is to forget.
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, os.ErrClosed) {
			slog.Warn("a notification of the host's file system", "path", n.dir, "err", err)
		}
	}
}

func (n *notices) give(message []byte) error {
	if agent.IsDropNames(message) {
		return dropNames(n.dir)
	}
	raw, err := n.kernel.SyscallConn()
	if err != nil {
		return err
	}
	// Not by Write, which waits for others that do.
	var written error
	err = raw.Control(func(fd uintptr) { _, written = unix.Write(int(fd), message) })
	return errors.Join(err, written)
}

// dropNames has the kernel forget what nobody uses of a mounted host directory: it does so whenever a file
// system is mounted anew with other options, which may be the same. What is open, a working directory or has
// something mounted on it stays, and all above that. An invalidation of names would unmount the latter.
// Source: reconfigure_super in Linux' fs/super.c, which calls shrink_dcache_sb.
func dropNames(dir string) error {
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|hostDirFlags, ""); err != nil {
		return fmt.Errorf("remount: %w", err)
	}
	return nil
}
