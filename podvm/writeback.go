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

// writeBackMax bounds what is written back of a file, in bytes.
const writeBackMax = 1 << 20

// writeBack puts what a container wrote into its copy of a file into the host's: only into files
// that were given to it for writing (the copies' names and the files' paths), in place, because the
// kubelet has them mounted elsewhere too.
func writeBack(files map[string]string, f *agent.WrittenFile) error {
	path, ok := files[f.Name]
	if !ok {
		return fmt.Errorf("%q: not a file that the container may write", printable(f.Name))
	}
	if len(f.Content) > writeBackMax {
		return fmt.Errorf("%s has more than %d bytes in the container; the node's stays as it is: use a volume for files that grow", path, writeBackMax)
	}
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
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
	old, err := io.ReadAll(io.LimitReader(file, writeBackMax+1))
	if err == nil && bytes.Equal(old, f.Content) {
		return nil
	}
	_, err = file.WriteAt(f.Content, 0)
	return errors.Join(err, file.Truncate(int64(len(f.Content))))
}
