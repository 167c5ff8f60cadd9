// Package torture makes the layers of an image that holds whatever is hard about images, for tests.
package torture

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// SparseSize is the size of sparse/big, in bytes, of which a few blocks are data.
const SparseSize = 2_500_000_000

// Layers returns the layers as uncompressed tar archives, the bottom first. dir is an empty
// directory for their making; it needs root and GNU tar.
func Layers(dir string) ([][]byte, error) {
	sparse, err := sparseLayer(dir)
	if err != nil {
		return nil, err
	}
	return [][]byte{base(), changes(), more(), sparse}, nil
}

// Tar collects tar entries. It is for tests: a mistake in an entry panics.
type Tar struct {
	buf bytes.Buffer
	w   *tar.Writer
}

// NewTar returns an empty archive.
func NewTar() *Tar {
	t := &Tar{}
	t.w = tar.NewWriter(&t.buf)
	return t
}

// Add appends an entry; what its header leaves out is filled in.
func (t *Tar) Add(hdr tar.Header, content string) {
	if hdr.Typeflag == 0 {
		hdr.Typeflag = tar.TypeReg
	}
	if hdr.Mode == 0 {
		hdr.Mode = 0o644
	}
	if hdr.ModTime.IsZero() {
		hdr.ModTime = time.Unix(1_600_000_000+int64(len(hdr.Name)), int64(len(content)))
	}
	hdr.Format = tar.FormatPAX
	hdr.Size = int64(len(content))
	if err := t.w.WriteHeader(&hdr); err != nil {
		panic(err)
	}
	if _, err := t.w.Write([]byte(content)); err != nil {
		panic(err)
	}
}

// Dir, File, Link and Symlink append entries of these kinds.
func (t *Tar) Dir(name string) {
	t.Add(tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755}, "")
}

// File appends a regular file.
func (t *Tar) File(name, content string) { t.Add(tar.Header{Name: name}, content) }

// Link appends a hard link.
func (t *Tar) Link(name, target string) {
	t.Add(tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeLink}, "")
}

// Symlink appends a symbolic link.
func (t *Tar) Symlink(name, target string) {
	t.Add(tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeSymlink, Mode: 0o777}, "")
}

// Bytes ends the archive and returns it.
func (t *Tar) Bytes() []byte {
	if err := t.w.Close(); err != nil {
		panic(err)
	}
	return t.buf.Bytes()
}

// Noise returns n bytes that don't compress, the same for the same seed.
func Noise(n int, seed uint64) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return string(b)
}

func base() []byte {
	t := NewTar()
	t.Add(tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o751, Uid: 3, Gid: 4}, "")
	for _, dir := range []string{"sizes", "kinds", "xattrs", "names", "many", "tree", "opaque", "opaque/sub", "swap",
		"swap/dir-to-file", "swap/dir-to-symlink", "links", "gone", "gone/deep", "attrs", "usr", "usr/lib"} {
		t.Dir(dir)
	}
	for i, size := range []int{0, 1, 511, 4095, 4096, 4097, 65535, 65536, 65537, 200_000, 5_000_000} {
		t.File(fmt.Sprintf("sizes/%d", size), Noise(size, uint64(i)))
	}
	t.File("sizes/zeros", strings.Repeat("\x00", 300_000))
	t.File("sizes/holes", strings.Repeat("\x00", 70_000)+"data"+strings.Repeat("\x00", 200_000)+"end")
	t.File("sizes/small-zero", strings.Repeat("\x00", 10))
	kinds(t)
	xattrs(t)
	names(t)
	crowds(t)
	for _, name := range []string{"opaque/old", "opaque/sub/old", "swap/dir-to-file/x", "swap/file-to-dir", "swap/dir-to-symlink/x",
		"gone/file", "gone/deep/file", "gone-file", "links/first", "attrs/kept", "replaced"} {
		t.File(name, "base "+name)
	}
	t.Link("links/second", "links/first")
	t.Link("links/third", "./links/second")
	t.Symlink("lib", "usr/lib")
	return t.Bytes()
}

func kinds(t *Tar) {
	for _, mode := range []int64{0o4755, 0o2755, 0o1777, 0o7777, 0o001} {
		t.Add(tar.Header{Name: fmt.Sprintf("kinds/mode-%04o", mode), Mode: mode}, "x")
	}
	t.Add(tar.Header{Name: "kinds/owner", Uid: 1000, Gid: 70_000}, "x")
	t.Add(tar.Header{Name: "kinds/owner-max", Uid: 1<<32 - 2, Gid: 1<<32 - 2}, "x")
	t.Add(tar.Header{Name: "kinds/nanoseconds", ModTime: time.Unix(1_700_000_000, 123_456_789)}, "x")
	t.Add(tar.Header{Name: "kinds/before-1970", ModTime: time.Unix(-1000, 500_000_000)}, "x")
	t.Add(tar.Header{Name: "kinds/after-2038", ModTime: time.Unix(5_000_000_000, 1)}, "x")
	t.Add(tar.Header{Name: "kinds/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}, "")
	t.Add(tar.Header{Name: "kinds/minor", Typeflag: tar.TypeChar, Devmajor: 4000, Devminor: 300_000}, "")
	t.Add(tar.Header{Name: "kinds/block", Typeflag: tar.TypeBlock, Devmajor: 8, Devminor: 1}, "")
	t.Add(tar.Header{Name: "kinds/fifo", Typeflag: tar.TypeFifo}, "")
	t.Symlink("kinds/symlink", "owner")
	t.Symlink("kinds/dangling", "/no/such/place")
	t.Symlink("kinds/long", strings.Repeat("0123456789/", 340))
	t.Symlink("kinds/longest", strings.Repeat("x", 4095))
	t.Add(tar.Header{Name: "kinds/owned-symlink", Linkname: "x", Typeflag: tar.TypeSymlink, Uid: 5, Gid: 6}, "")
	t.Link("kinds/symlink-too", "kinds/symlink")
	t.Link("kinds/fifo-too", "kinds/fifo")
	t.Add(tar.Header{Name: "kinds/empty-sticky/", Typeflag: tar.TypeDir, Mode: 0o1777, Uid: 9}, "")
}

func xattrs(t *Tar) {
	// cap_net_bind_service=ep, revision 2.
	capability := string([]byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	set := func(name string, kind byte, records map[string]string) {
		pax := map[string]string{}
		for k, v := range records {
			pax["SCHILY.xattr."+k] = v
		}
		t.Add(tar.Header{Name: name, Typeflag: kind, Mode: 0o750, PAXRecords: pax}, "")
	}
	set("xattrs/capability", tar.TypeReg, map[string]string{"security.capability": capability})
	set("xattrs/user", tar.TypeReg, map[string]string{"user.a": "1", "user.b": "", "user." + strings.Repeat("n", 200): "long"})
	set("xattrs/large", tar.TypeReg, map[string]string{"user.large": Noise(3000, 77), "trusted.small": "t"})
	set("xattrs/acl", tar.TypeReg, map[string]string{"system.posix_acl_access": acl()})
	set("xattrs/acl-dir/", tar.TypeDir, map[string]string{"system.posix_acl_access": acl(), "system.posix_acl_default": acl(), "user.dir": "d"})
	set("xattrs/many", tar.TypeReg, map[string]string{"user.x": Noise(900, 1), "user.y": Noise(901, 2), "user.z": Noise(902, 3), "security.capability": capability})
}

// acl is user::rwx user:1000:r-- group::r-x mask::r-x other::---.
func acl() string {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, 1<<32 - 1}, {2, 4, 1000}, {4, 5, 1<<32 - 1}, {16, 5, 1<<32 - 1}, {32, 0, 1<<32 - 1}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}

func names(t *Tar) {
	for _, name := range []string{strings.Repeat("n", 255), strings.Repeat("é", 127), "with space", "new\nline", "-dash", "!bang",
		"..dots", "...", "back\\slash", "tab\t", "日本語", ".wh", "quote\"'"} {
		t.File("names/"+name, name)
	}
	deep := "names"
	for range 12 {
		deep += "/" + strings.Repeat("d", 250)
		t.Dir(deep)
	}
	t.File(deep+"/leaf", "deep")
}

func crowds(t *Tar) {
	for i := range 1500 {
		t.File(fmt.Sprintf("many/file-%d-%s", i, strings.Repeat("p", i%90)), fmt.Sprint(i))
	}
	for d := range 60 {
		t.Dir(fmt.Sprintf("tree/%02d", d))
		for i := range 195 {
			t.File(fmt.Sprintf("tree/%02d/%03d", d, i), Noise(i*17, uint64(i)))
		}
	}
}

// changes is a layer that hides, replaces and links.
func changes() []byte {
	t := NewTar()
	for _, dir := range []string{"opaque", "swap", "gone", "links", "swap/file-to-dir", "many", "usr", "usr/lib"} {
		t.Dir(dir)
	}
	t.File("opaque/.wh..wh..opq", "")
	t.File("opaque/new", "new")
	t.Dir("opaque/sub")
	t.File("opaque/sub/new", "new")
	t.File("gone/.wh.file", "")
	t.File("gone/.wh.deep", "")
	t.File(".wh.gone-file", "")
	t.File("many/.wh.file-7-"+strings.Repeat("p", 7), "")
	t.File(".wh.never-was", "")
	t.File("replaced", "now with other content "+Noise(9000, 5))
	t.File("swap/dir-to-file", "a file")
	t.File("swap/file-to-dir/inside", "inside")
	t.Symlink("swap/dir-to-symlink", "file-to-dir")
	t.File("links/first", "first is another file now")
	t.Link("links/fourth", "links/third")
	t.Add(tar.Header{Name: "attrs/", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 12, ModTime: time.Unix(1, 2)}, "")
	t.File("usr/lib/through", "x")
	t.File("implicit/parents/file", "x")
	t.File("/absolute", "x")
	return t.Bytes()
}

// more is a layer that undoes some of what the one below did.
func more() []byte {
	t := NewTar()
	for _, dir := range []string{"gone", "gone/deep", "swap", "swap/dir-to-file", "opaque", "usr", "usr/lib"} {
		t.Dir(dir)
	}
	t.File("gone/deep/again", "again")
	t.File("swap/dir-to-file/y", "a directory again")
	t.File("swap/.wh.file-to-dir", "")
	t.File("opaque/.wh.sub", "")
	t.File("lib/by-symlink", "in usr/lib")
	return t.Bytes()
}

// sparseLayer lets GNU tar write what Go can't: a sparse file.
func sparseLayer(dir string) ([]byte, error) {
	if err := os.Mkdir(filepath.Join(dir, "sparse"), 0o755); err != nil {
		return nil, err
	}
	f, err := os.Create(filepath.Join(dir, "sparse", "big"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for _, at := range []int64{0, 70_000, 1 << 30, SparseSize - 5} {
		if _, err := f.WriteAt([]byte("data!"), at); err != nil {
			return nil, err
		}
	}
	out, err := exec.Command("tar", "--create", "--sparse", "--format=posix", "--directory", dir, "--file", "-", "sparse").Output()
	if err != nil {
		return nil, fmt.Errorf("tar --sparse: %w", err)
	}
	return out, nil
}
