package podvm

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/caisson-vm/caisson/imagestore/erofs"
	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// What a clone writes when its pod's first container is made is what others have to have copies of. A clone that
// is to teach that goes the same way, with an image that comes from here.

// waiter is the program of its container, by its name there.
const waiter = "/wait"

// rehearseStart has a clone start a container of an image, which is plugged in for it, and leaves it running.
func (b *birth) rehearseStart(ctx context.Context, rpc agent.AgentClient) error {
	path := b.m.layout.image(b.id, "lesson")
	if err := writeLesson(ctx, path); err != nil {
		return fmt.Errorf("an image to start a container of: %w", err)
	}
	address, err := b.attachDisk(ctx, "lesson", vmm.Disk{Serial: "lesson", Path: path, ReadOnly: true, Shared: b.m.o.DAX})
	if err != nil {
		return err
	}
	return rehearseWith(ctx, rpc, waiter, &agent.Rootfs{ImageAddr: address, Dax: isPMEM(address)})
}

// writeLesson makes the image: the directories that a container's file systems are mounted on, and a program.
func writeLesson(ctx context.Context, path string) error {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	program := waiting()
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: waiter, Mode: 0o755, Size: int64(len(program))}); err != nil {
		return err
	}
	if _, err := w.Write(program); err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/etc", "/proc", "/sys"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return writeImage(ctx, f, &layer)
}

func writeImage(ctx context.Context, f *os.File, layer io.Reader) error {
	image := erofs.NewWriter(f, [16]byte{1}, erofs.Limits{})
	l, err := image.Read(ctx, layer)
	if err != nil {
		return err
	}
	if err := image.Apply(ctx, l); err != nil {
		return err
	}
	_, err = image.Finish()
	return err
}

// waiting is a program, for amd64, which waits for signals and does nothing else. A larger one would have more
// pages, for which most containers' have other ones.
// Source: elf(5).
func waiting() []byte {
	const at, headers = 0x400000, 64 + 56
	code := []byte{
		0xb8, 34, 0, 0, 0, // mov $34,%eax: pause(2)
		0x0f, 0x05, // syscall
		0xeb, 0xf7, // jmp to the mov
	}
	var b bytes.Buffer
	b.WriteString("\x7fELF\x02\x01\x01")
	b.Write(make([]byte, 9))
	size := uint64(headers + len(code))
	for _, v := range []any{
		uint16(2), uint16(62), uint32(1), uint64(at + headers), uint64(64), uint64(0), uint32(0), // ET_EXEC, EM_X86_64
		uint16(64), uint16(56), uint16(1), uint16(64), uint16(0), uint16(0),
		uint32(1), uint32(5), uint64(0), uint64(at), uint64(at), size, size, uint64(4096), // PT_LOAD, readable and executable
	} {
		binary.Write(&b, binary.LittleEndian, v)
	}
	b.Write(code)
	return b.Bytes()
}
