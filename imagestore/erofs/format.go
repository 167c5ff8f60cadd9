package erofs

import (
	"encoding/binary"
	"hash/crc32"
)

// The on-disk format, as far as this writer uses it.
// Source: Linux fs/erofs/erofs_fs.h.
const (
	blockBits = 12
	blockSize = 1 << blockBits

	superOffset = 1024
	superSize   = 128
	superMagic  = 0xE0F5E1E2

	compatChecksum     = 0x1
	compatMtime        = 0x2
	incompatChunkFiles = 0x4

	inodeSize   = 64 // an extended inode
	inodeSlot   = 32 // inodes are numbered in units of this
	inodeMaxLen = blockSize

	layoutPlain  = 0
	layoutInline = 2
	layoutChunks = 4

	direntSize = 12
	hole       = 0xFFFFFFFF // a chunk without blocks
)

var le = binary.LittleEndian

// superblock fills b, the image's first block.
func superblock(b []byte, s *super) {
	sb := b[superOffset:]
	le.PutUint32(sb[0:], superMagic)
	le.PutUint32(sb[8:], compatChecksum|compatMtime)
	sb[12] = blockBits
	le.PutUint16(sb[14:], s.rootNid)
	le.PutUint64(sb[16:], s.inodes)
	le.PutUint32(sb[36:], s.blocks)
	le.PutUint32(sb[40:], s.metaBlock)
	copy(sb[48:64], s.uuid[:])
	le.PutUint32(sb[80:], incompatChunkFiles)
	// The kernel's crc32c has no final inversion.
	sum := ^crc32.Checksum(b[superOffset:blockSize], crc32.MakeTable(crc32.Castagnoli))
	le.PutUint32(sb[4:], sum)
}

type super struct {
	rootNid   uint16
	inodes    uint64
	blocks    uint32
	metaBlock uint32
	uuid      [16]byte
}

// put writes the inode's fixed part into b, which is zero.
func (n *inode) put(b []byte, number uint32) {
	le.PutUint16(b[0:], 1|n.layout<<1) // bit 0: an extended inode
	le.PutUint16(b[2:], xattrCount(n.xattrs))
	le.PutUint16(b[4:], uint16(n.mode))
	le.PutUint64(b[8:], uint64(n.size))
	le.PutUint32(b[16:], n.union())
	le.PutUint32(b[20:], number)
	le.PutUint32(b[24:], n.uid)
	le.PutUint32(b[28:], n.gid)
	le.PutUint64(b[32:], uint64(n.mtime))
	le.PutUint32(b[40:], n.mtimeNsec)
	le.PutUint32(b[44:], n.nlink)
}

// union is the field whose meaning depends on the kind of file.
func (n *inode) union() uint32 {
	switch {
	case n.layout == layoutChunks:
		return uint32(n.chunkBits - blockBits)
	case n.isDevice():
		return n.rdev
	}
	return n.block
}

// deviceNumber is the kernel's new_encode_dev.
func deviceNumber(major, minor int64) uint32 {
	return uint32(minor&0xFF | major<<8 | (minor&^0xFF)<<12)
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
