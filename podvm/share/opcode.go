package share

import "golang.org/x/sys/unix"

// Opcodes of linux/fuse.h.
const (
	opSetattr       = 4
	opReadlink      = 5
	opSymlink       = 6
	opMknod         = 8
	opMkdir         = 9
	opUnlink        = 10
	opRmdir         = 11
	opRename        = 12
	opLink          = 13
	opOpen          = 14
	opRead          = 15
	opWrite         = 16
	opSetxattr      = 21
	opGetxattr      = 22
	opListxattr     = 23
	opRemovexattr   = 24
	opReaddir       = 28
	opSetlkw        = 33
	opCreate        = 35
	opFallocate     = 43
	opReaddirplus   = 44
	opRename2       = 45
	opCopyFileRange = 47
	opTmpfile       = 51
	opCopyFile64    = 53
)

// writes tells the requests that a directory which is read-only with all below refuses. Its mounts are
// read-only too, but not those that the host makes below it later.
func (r fuseRequest) writes() bool {
	switch r.opcode {
	case opOpen: // fuse_open_in: flags
		flags := r.uint32(inHeader)
		return flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0
	case opSetattr, opSymlink, opMknod, opMkdir, opUnlink, opRmdir, opRename, opLink, opWrite, opSetxattr, opRemovexattr,
		opCreate, opFallocate, opRename2, opCopyFileRange, opTmpfile, opCopyFile64:
		return true
	}
	return false
}
