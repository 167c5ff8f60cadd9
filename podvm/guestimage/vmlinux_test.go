package guestimage

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// elfWithNote makes a minimal ELF whose only content is a Xen note of the type.
func elfWithNote(kind uint32) []byte {
	le := binary.LittleEndian
	b := make([]byte, 64, 200)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)    // executable
	le.PutUint16(b[18:], 0x3e) // x86-64
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[32:], 64) // program headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	b = le.AppendUint32(b, 4) // PT_NOTE
	b = le.AppendUint32(b, 4)
	for _, v := range []uint64{120, 0, 0, 20, 20, 4} {
		b = le.AppendUint64(b, v)
	}
	for _, v := range []uint32{4, 4, kind} {
		b = le.AppendUint32(b, v)
	}
	b = append(b, "Xen\x00"...)
	return le.AppendUint32(b, 0x1000000)
}

// bzImage wraps a compressed kernel as the kernel's build does.
func bzImage(payload []byte, size int) []byte {
	le := binary.LittleEndian
	b := make([]byte, 1024)
	b[0x1f1] = 1
	copy(b[0x202:], "HdrS")
	le.PutUint16(b[0x206:], 0x20f)
	le.PutUint32(b[0x248:], 0)
	le.PutUint32(b[0x24c:], uint32(len(payload)+4))
	return le.AppendUint32(append(b, payload...), uint32(size))
}

func TestVmlinuxFormats(t *testing.T) {
	kernel := append(elfWithNote(18), bytes.Repeat([]byte("kernel"), 2<<20)...) // two LZ4 blocks
	packers := map[string]func() []byte{
		"lz4": func() []byte {
			out := bytes.Clone(magicLZ4)
			for rest := kernel; len(rest) > 0; {
				part := rest[:min(8<<20, len(rest))]
				rest = rest[len(part):]
				block := make([]byte, lz4.CompressBlockBound(len(part)))
				n, err := lz4.CompressBlock(part, block, nil)
				if err != nil {
					t.Fatal(err)
				}
				out = append(binary.LittleEndian.AppendUint32(out, uint32(n)), block[:n]...)
			}
			return out
		},
		"zstd": func() []byte {
			w, err := zstd.NewWriter(nil)
			if err != nil {
				t.Fatal(err)
			}
			return w.EncodeAll(kernel, nil)
		},
		"gzip": func() []byte {
			var b bytes.Buffer
			w := gzip.NewWriter(&b)
			if _, err := w.Write(kernel); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			return b.Bytes()[:b.Len()-4] // bzImage appends the size, which is gzip's own end
		},
	}
	for name, pack := range packers {
		got, err := vmlinux(bzImage(pack(), len(kernel)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !bytes.Equal(got, kernel) {
			t.Errorf("%s: the kernel came out differently", name)
		}
	}
}

func TestVmlinuxRefuses(t *testing.T) {
	packed := func(kernel []byte) []byte {
		w, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		return w.EncodeAll(kernel, nil)
	}
	good := elfWithNote(18)
	cut := bzImage(packed(good), len(good))
	for name, c := range map[string]struct {
		image []byte
		want  string
	}{
		"empty":          {nil, "not a bzImage"},
		"not a kernel":   {make([]byte, 4096), "not a bzImage"},
		"cut short":      {cut[:len(cut)-8], "not within the bzImage"},
		"unknown format": {bzImage([]byte("BZh91AY&SY"), 1), "unknown format"},
		"wrong size":     {bzImage(packed(good), len(good)+1), "bytes of"},
		"huge":           {bzImage(packed(good), kernelMax+1), "over the limit"},
		"no PVH entry":   {bzImage(packed(elfWithNote(6)), len(good)), "no PVH entry point"},
		"damaged LZ4":    {bzImage(append(bytes.Clone(magicLZ4), 0xff, 0xff, 0, 0, 1), 9), "unexpected EOF"},
	} {
		if _, err := vmlinux(c.image); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", name, err, c.want)
		}
	}
}
