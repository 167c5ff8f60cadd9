// Package passthrough serves one directory of the host to a guest by the FUSE protocol. The guest
// is hostile: whatever it sends, it reaches nothing but what is in the directory.
//
// Every inode that the guest knows is an O_PATH descriptor, as in virtiofsd. A name is a single
// component that is resolved from its directory's descriptor and never followed if it is a symlink;
// there are no paths, so nothing can be swapped in one. What needs more than O_PATH is opened anew
// by /proc/self/fd.
package passthrough

import (
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// MaxWrite is the most bytes of one read or write.
	MaxWrite = 256 << 10
	// valid is how many seconds the guest may keep a name or attributes without asking: what the
	// host changes appears within that time. A name that is not there is never kept.
	valid = 1
	// background is how many reads ahead, direct requests and writes back the guest has under way.
	background = 128
)

// FS serves one directory. Its methods may be called concurrently.
type FS struct {
	fuse.RawFileSystem // answers ENOSYS
	// dev is the device of the root: its inode numbers are as they are on the host.
	dev     uint64
	creds   *creds
	budget  *budget
	nodes   nodes
	handles handles
	kept    keptEntries
	locks   lockCount
	done    chan struct{} // closed by Close
	close   sync.Once
	panics  sync.Once // logs the first
	sockets sockets
}

// New serves the directory that root, an O_PATH descriptor, is of. It takes root over. It sets the
// process's umask to 0: the guest says a file's mode, and a umask is the whole process's.
func New(root *os.File) (*FS, error) {
	defer root.Close()
	fd, err := unix.FcntlInt(root.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the descriptor of %s: %w", root.Name(), err)
	}
	f, err := serve(fd)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("share %s: %w", root.Name(), err)
	}
	return f, nil
}

func serve(fd int) (*FS, error) {
	var st unix.Statx_t
	if err := statNode(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, unix.ENOTDIR
	}
	again, err := reopen(fd, unix.O_PATH)
	if err != nil {
		return nil, fmt.Errorf("reopen by /proc, which has to be mounted: %w", err)
	}
	unix.Close(again)
	c, err := ownCreds()
	if err != nil {
		return nil, err
	}
	all, err := ownFiles()
	if err != nil {
		return nil, err
	}
	b := &budget{all: all}
	unix.Umask(0)
	f := &FS{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		dev:           device(&st), creds: c, budget: b, done: make(chan struct{}),
	}
	f.nodes.init(b, fd, &st)
	f.handles.init(b)
	return f, nil
}

// Options are what a server of f has to negotiate.
func (f *FS) Options() *fuse.MountOptions {
	return &fuse.MountOptions{
		Name: "caisson", FsName: "caisson",
		MaxWrite: MaxWrite, MaxBackground: background,
		EnableLocks: true, EnableAcl: true,
		// The guest decides how much there is to log.
		Logger:       log.New(io.Discard, "", 0),
		PanicHandler: f.panicked,
		// DONT_MASK: whether the umask counts depends on the directory's default ACL, which the host
		// knows. ATOMIC_O_TRUNC saves a request. HANDLE_KILLPRIV_V2 saves one per write, and
		// SETXATTR_EXT is its counterpart for ACLs. READDIRPLUS_AUTO opens inodes only when asked for.
		ExtraCapabilities: fuse.CAP_DONT_MASK | fuse.CAP_ATOMIC_O_TRUNC | fuse.CAP_HANDLE_KILLPRIV_V2 |
			fuse.CAP_SETXATTR_EXT | fuse.CAP_READDIRPLUS_AUTO | fuse.CAP_ASYNC_DIO,
		DisabledCapabilities: fuse.CAP_PASSTHROUGH | fuse.CAP_NO_OPEN_SUPPORT,
	}
}

// panicked fails a request. A guest that knows how to make one panic must not fill the log.
func (f *FS) panicked(what any) fuse.Status {
	f.panics.Do(func() {
		slog.Error("a request of a guest's share panicked; those that follow are not logged",
			"panic", what, "stack", string(debug.Stack()))
	})
	return fuse.EIO
}

// Close closes all descriptors, those in use when their operation ends, and ends waits for locks.
func (f *FS) Close() error {
	f.close.Do(func() {
		close(f.done)
		f.handles.closeAll()
		f.nodes.closeAll()
	})
	return nil
}

func (f *FS) String() string { return "caisson" }
