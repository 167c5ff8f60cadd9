package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// accountsMax bounds /etc/passwd and /etc/group of an image, in bytes.
const accountsMax = 4 << 20

// account is a user as the container's process has it.
type account struct {
	uid, gid uint32
	// groups are the supplemental ones, with gid among them.
	groups []uint32
	home   string
}

// resolveUser finds who a user is by the files of the root file system.
func resolveUser(rootfs string, u *agent.User) (account, error) {
	passwd, err := readInRoot(rootfs, "/etc/passwd")
	if err != nil {
		return account{}, err
	}
	group, err := readInRoot(rootfs, "/etc/group")
	if err != nil {
		return account{}, err
	}
	name := u.GetName()
	if name == "" {
		name = strconv.FormatInt(u.GetUid(), 10)
		if !u.GetHasUid() {
			name = "0"
		}
	}
	// moby's parsers take what they can of a malformed file.
	found, err := user.GetExecUser(name, &user.ExecUser{Home: "/"}, reader(passwd), reader(group))
	if err != nil {
		return account{}, fmt.Errorf("user %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	if found.Uid < 0 || found.Gid < 0 {
		return account{}, fmt.Errorf("user %q: negative ids: %w", name, errdefs.ErrInvalidArgument)
	}
	a := account{uid: uint32(found.Uid), gid: uint32(found.Gid), home: found.Home}
	if u.GetHasGid() {
		a.gid = uint32(u.GetGid())
	}
	a.groups = []uint32{a.gid}
	if !u.GetStrictGroups() {
		more, err := groupsOf(a.uid, passwd, group)
		if err != nil {
			return account{}, fmt.Errorf("groups of user %q: %w", name, err)
		}
		a.groups = append(a.groups, more...)
	}
	a.groups = append(a.groups, u.GetSupplementalGroups()...)
	slices.Sort(a.groups)
	a.groups = slices.Compact(a.groups)
	if a.home == "" {
		a.home = "/"
	}
	return a, nil
}

// groupsOf are the groups that list the user of that id as a member.
func groupsOf(uid uint32, passwd, group []byte) ([]uint32, error) {
	users, err := user.ParsePasswdFilter(reader(passwd), func(u user.User) bool { return u.Uid == int(uid) })
	if err != nil || len(users) == 0 {
		return nil, err
	}
	groups, err := user.ParseGroupFilter(reader(group), func(g user.Group) bool {
		return g.Gid >= 0 && slices.Contains(g.List, users[0].Name)
	})
	if err != nil {
		return nil, err
	}
	var ids []uint32
	for _, g := range groups {
		ids = append(ids, uint32(g.Gid))
	}
	return ids, nil
}

// readInRoot reads a file of a root file system that is not trusted: links lead nowhere outside, and
// only a regular file of a sane size is read. A file that is not there is empty.
func readInRoot(rootfs, name string) ([]byte, error) {
	f, err := openInRoot(rootfs, name, unix.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("open %s of the image: %w", name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s of the image is no regular file: %w", name, errdefs.ErrInvalidArgument)
	}
	b, err := io.ReadAll(io.LimitReader(f, accountsMax+1))
	if err == nil && len(b) > accountsMax {
		err = fmt.Errorf("%s of the image is over %d bytes: %w", name, accountsMax, errdefs.ErrInvalidArgument)
	}
	return b, err
}

func reader(b []byte) io.Reader { return bytes.NewReader(b) }

// openInRoot opens a path as a process whose root directory is dir would.
func openInRoot(dir, name string, flags uint64) (*os.File, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	fd, err := unix.Openat2(root, name, &how)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}
