package podvm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// writeBackAll puts what a container wrote into its copies of files, as the guest tells it, into the host's: each
// of those that were given to it for writing (the copies' names and the files' paths) once. Of others a guest may
// tell any number.
func writeBackAll(files map[string]string, written []*agent.WrittenFile) error {
	var errs []error
	taken, others := map[string]bool{}, 0
	for _, f := range written {
		if files[f.Name] == "" || taken[f.Name] {
			others++
			continue
		}
		taken[f.Name] = true
		errs = append(errs, writeBack(files[f.Name], f.Content))
	}
	if others > 0 {
		errs = append(errs, fmt.Errorf("the guest tells of %d files more, which the container may not write", others))
	}
	return errors.Join(errs...)
}

// openAsFound opens a path of the host that had no symbolic links in it when it was found. A guest may have put
// one there since, in a directory that it can write to.
func openAsFound(path string, flags uint64) (*os.File, error) {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: flags | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// writeBack puts what a container wrote into its copy of a file into the host's, in place, because the kubelet
// has it mounted elsewhere too.
func writeBack(path string, content []byte) error {
	if len(content) > agent.WrittenMax {
		return fmt.Errorf("%s has more than %d bytes in the container; the node's stays as it is: use a volume for files that grow", path, agent.WrittenMax)
	}
	file, err := openAsFound(path, unix.O_RDWR)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file any more", path)
	}
	old, err := io.ReadAll(io.LimitReader(file, agent.WrittenMax+1))
	if err == nil && bytes.Equal(old, content) {
		return nil
	}
	_, err = file.WriteAt(content, 0)
	return errors.Join(err, file.Truncate(int64(len(content))))
}
