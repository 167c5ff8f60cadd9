// Package hungfs gives tests a file system that never answers, as that of a server which is lost.
package hungfs

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Mount mounts one for the time of a test, which is skipped where that can't be done, and returns its folder.
// Whoever looks for something in it waits until end is called, or the test ends.
func Mount(t *testing.T) (dir string, end func()) {
	t.Helper()
	dir = t.TempDir()
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skip("needs /dev/fuse:", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse.Fd())
	if err := unix.Mount("hung", dir, "fuse", 0, options); err != nil {
		fuse.Close()
		t.Skip("needs root for a file system of its own:", err)
	}
	end = func() { fuse.Close() }
	t.Cleanup(func() {
		end()
		unix.Unmount(dir, unix.MNT_DETACH)
	})
	return dir, end
}
