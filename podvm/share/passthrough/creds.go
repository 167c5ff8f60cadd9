package passthrough

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// caps are a thread's capabilities as the kernel has them, in two halves.
type caps [2]unix.CapUserData

// creds change what a single thread is for the kernel, while it does one thing.
type creds struct {
	uid, gid uint32
	own      caps
	// strict is own without CAP_FSETID: then the kernel removes set-user-ID and set-group-ID bits
	// as it does for a caller without privileges.
	strict caps
}

func ownCreds() (*creds, error) {
	c := &creds{uid: fsuid(keepID), gid: fsgid(keepID)}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&header, &c.own[0]); err != nil {
		return nil, fmt.Errorf("read own capabilities: %w", err)
	}
	c.strict = c.own
	c.strict[0].Effective &^= 1 << unix.CAP_FSETID
	return c, nil
}

func (c *caps) set() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	return unix.Capset(&header, &c[0])
}

// keepID is no user or group: with it, the calls return what there is.
const keepID = ^uint32(0)

// fsuid sets the thread's user for files, and returns the one before. It fails silently.
func fsuid(id uint32) uint32 {
	before, _, _ := unix.RawSyscall(unix.SYS_SETFSUID, uintptr(id), 0, 0)
	return uint32(before)
}

func fsgid(id uint32) uint32 {
	before, _, _ := unix.RawSyscall(unix.SYS_SETFSGID, uintptr(id), 0, 0)
	return uint32(before)
}

// become makes the thread the user and group for files, with all of the process's capabilities.
func (c *creds) become(uid, gid uint32) error {
	fsgid(gid)
	fsuid(uid)
	// The kernel has taken CAP_DAC_OVERRIDE and others away. The guest's kernel has checked what the
	// caller may.
	if err := c.own.set(); err != nil {
		return err
	}
	if fsgid(keepID) != gid || fsuid(keepID) != uid {
		return unix.EPERM
	}
	return nil
}

// as does something as the user and group for files: a new file is theirs, as are its quota, what
// a set-group-ID directory makes of it, and the request to an NFS server.
func (c *creds) as(uid, gid uint32, do func() error) error {
	switch {
	case uid == c.uid && gid == c.gid:
		return do()
	case uid == keepID || gid == keepID:
		return unix.EINVAL
	}
	return onThread(func() error { return c.become(uid, gid) }, do, func() error { return c.become(c.uid, c.gid) })
}

// withoutFSETID does something that removes set-user-ID and set-group-ID bits of what it changes.
func (c *creds) withoutFSETID(do func() error) error {
	if c.strict == c.own {
		return do()
	}
	return onThread(c.strict.set, do, c.own.set)
}

// onThread does something on a thread that is changed before and restored after. A thread that
// can't be restored ends: it stays locked to a goroutine that returns, which is not the caller's,
// since that may serve more.
func onThread(change, do, restore func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := change()
		if err == nil {
			err = do()
		}
		if restore() == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}
