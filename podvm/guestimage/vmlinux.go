package guestimage

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// kernelMax is the largest uncompressed kernel taken, in bytes.
const kernelMax = 256 << 20

// The magic numbers of a compressed kernel's formats.
var (
	magicGzip = []byte{0x1f, 0x8b}
	magicZstd = []byte{0x28, 0xb5, 0x2f, 0xfd}
	magicLZ4  = []byte{0x02, 0x21, 0x4c, 0x18} // the legacy frame
	magicELF  = []byte(elf.ELFMAG)
)

// vmlinux returns the ELF kernel inside a bzImage.
// Source: Documentation/arch/x86/boot.rst of the Linux kernel.
func vmlinux(bzImage []byte) ([]byte, error) {
	const headerEnd = 0x250
	if len(bzImage) < headerEnd || string(bzImage[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage: it has no setup header")
	}
	if version := binary.LittleEndian.Uint16(bzImage[0x206:]); version < 0x208 {
		return nil, fmt.Errorf("boot protocol %d.%02d does not locate the payload, 2.08 does", version>>8, version&0xff)
	}
	sectors := int64(bzImage[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	start := (sectors+1)*512 + int64(binary.LittleEndian.Uint32(bzImage[0x248:]))
	length := int64(binary.LittleEndian.Uint32(bzImage[0x24c:]))
	if start+length > int64(len(bzImage)) || length < 8 {
		return nil, fmt.Errorf("the payload (%d bytes at %d) is not within the bzImage of %d bytes", length, start, len(bzImage))
	}
	kernel, err := decompress(bzImage[start : start+length])
	if err != nil {
		return nil, fmt.Errorf("decompress kernel: %w", err)
	}
	return kernel, checkPVH(kernel)
}

func decompress(payload []byte) ([]byte, error) {
	// The kernel's build appends the uncompressed size (gzip has it there anyway).
	body := payload[:len(payload)-4]
	size := int64(binary.LittleEndian.Uint32(payload[len(payload)-4:]))
	if size > kernelMax {
		return nil, fmt.Errorf("%d bytes are over the limit of %d", size, kernelMax)
	}
	var kernel []byte
	var err error
	switch {
	case bytes.HasPrefix(payload, magicELF):
		return payload, nil
	case bytes.HasPrefix(payload, magicLZ4):
		kernel, err = decompressLZ4(body[len(magicLZ4):], size)
	case bytes.HasPrefix(payload, magicZstd):
		var r *zstd.Decoder
		if r, err = zstd.NewReader(nil, zstd.WithDecoderMaxMemory(kernelMax)); err == nil {
			kernel, err = r.DecodeAll(body, make([]byte, 0, size))
			r.Close()
		}
	case bytes.HasPrefix(payload, magicGzip):
		var r *gzip.Reader
		if r, err = gzip.NewReader(bytes.NewReader(payload)); err == nil {
			kernel, err = io.ReadAll(io.LimitReader(r, kernelMax))
		}
	default:
		return nil, fmt.Errorf("unknown format, its magic is %x (LZ4, zstd and gzip are known)", payload[:6])
	}
	if err == nil && int64(len(kernel)) != size {
		err = fmt.Errorf("got %d bytes of %d", len(kernel), size)
	}
	return kernel, err
}

// decompressLZ4 reads the blocks of a legacy LZ4 frame: each a length (4 bytes, little endian)
// and that many bytes, which hold at most 8 MiB.
func decompressLZ4(frame []byte, size int64) ([]byte, error) {
	kernel := make([]byte, size)
	var n int64
	for len(frame) >= 4 {
		length := int64(binary.LittleEndian.Uint32(frame))
		frame = frame[4:]
		if length > int64(len(frame)) {
			return nil, io.ErrUnexpectedEOF
		}
		got, err := lz4.UncompressBlock(frame[:length], kernel[n:])
		if err != nil {
			return nil, err
		}
		n += int64(got)
		frame = frame[length:]
	}
	return kernel[:n], nil
}

// checkPVH returns an error unless the kernel has the entry point by which VMMs start an ELF
// kernel: the Xen note PHYS32_ENTRY.
func checkPVH(kernel []byte) error {
	f, err := elf.NewFile(bytes.NewReader(kernel))
	if err != nil {
		return err
	}
	const phys32Entry = 18
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		notes, err := io.ReadAll(p.Open())
		if err != nil {
			return err
		}
		for len(notes) >= 12 {
			name := int64(binary.LittleEndian.Uint32(notes))
			desc := int64(binary.LittleEndian.Uint32(notes[4:]))
			kind := binary.LittleEndian.Uint32(notes[8:])
			if kind == phys32Entry && bytes.HasPrefix(notes[12:], []byte("Xen\x00")) {
				return nil
			}
			next := 12 + (name+3)&^3 + (desc+3)&^3
			notes = notes[min(next, int64(len(notes))):]
		}
	}
	return errors.New("the kernel has no PVH entry point (CONFIG_PVH)")
}
