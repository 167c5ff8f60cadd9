package podvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/vmm"
)

// Scratch makes pods' scratch disks: sparse files with an empty ext4. The file system is made once
// and copied, which takes less than making it.
type Scratch struct {
	template string
	size     int64

	mu        sync.Mutex // held while the template is made: pods wait for it
	formatted bool
}

// formatLimit bounds mkfs.
const formatLimit = time.Minute

// ScratchDisk is the disk that every VM has from the beginning, but for its file.
func ScratchDisk() *vmm.Disk { return &vmm.Disk{Serial: "scratch"} }

// NewScratch keeps the file system that is copied in the folder root. The size of a disk is in bytes;
// it takes what is written to it.
func NewScratch(root string, size int64) (*Scratch, error) {
	if size <= 0 {
		return nil, fmt.Errorf("scratch disks of %d bytes: %w", size, errdefs.ErrInvalidArgument)
	}
	return &Scratch{template: filepath.Join(root, "scratch.template"), size: size}, nil
}

// Create makes a disk at path. A full file system is errdefs.ErrResourceExhausted.
func (s *Scratch) Create(path string) error {
	if err := s.prepare(); err != nil {
		return err
	}
	return copyDisk(s.template, path)
}

func scratchAddress() string { return vmm.SerialAddress(ScratchDisk().Serial) }

// copyDisk copies a sparse file; on error there is none.
func copyDisk(from, to string) error {
	if err := copySparse(from, to); err != nil {
		return errors.Join(noSpace(err, to), remove(to))
	}
	return nil
}

// prepare makes the template, if that was not done or failed before.
func (s *Scratch) prepare() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.formatted {
		return nil
	}
	if err := s.format(); err != nil {
		return errors.Join(err, remove(s.template+".new"))
	}
	s.formatted = true
	return nil
}

// format makes the template, anew with each daemon: it is quick, and its size may have changed. It
// has no journal and no second copy of anything, for a scratch disk never outlives its VM and is to
// be copied in no time (180 KB in 3 extents for 64 GiB), and project quotas, by which the guest
// counts what each container and volume takes.
func (s *Scratch) format() error {
	f, err := os.Create(s.template + ".new")
	if err != nil {
		return fmt.Errorf("template: %w", noSpace(err, s.template))
	}
	defer f.Close()
	if err := f.Truncate(s.size); err != nil {
		return fmt.Errorf("template: %w", noSpace(err, s.template))
	}
	ctx, cancel := context.WithTimeout(context.Background(), formatLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode,sparse_super2,quota,project",
		"-E", "num_backup_sb=0,packed_meta_blocks=1,lazy_itable_init=1,discard,quotatype=prjquota,root_owner=0:0", f.Name()).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("no mkfs.ext4; install e2fsprogs: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return os.Rename(f.Name(), s.template)
}

// copySparse copies what a file has data in; the rest is holes in both.
func copySparse(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil { // file systems that share blocks
		return out.Close()
	}
	if err := out.Truncate(info.Size()); err != nil {
		return err
	}
	for at := int64(0); ; {
		start, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return out.Close()
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(in.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(out, start), io.NewSectionReader(in, start, end-start)); err != nil {
			return err
		}
		at = end
	}
}

// noSpace turns the error of a full disk into errdefs.ErrResourceExhausted that says which disk.
func noSpace(err error, path string) error {
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	free := "an unknown number of"
	var fs unix.Statfs_t
	if unix.Statfs(filepath.Dir(path), &fs) == nil {
		free = strconv.FormatUint(fs.Bavail*uint64(fs.Bsize), 10)
	}
	return fmt.Errorf("the disk of %s is full (%s bytes free): free some: %w: %w", filepath.Dir(path), free, err, errdefs.ErrResourceExhausted)
}
