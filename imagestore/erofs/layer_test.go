package erofs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/imagestore/internal/torture"
)

// archiveOf makes a layer of lines: "d dir", "f file content", "l link target", "s symlink target".
func archiveOf(lines string) []byte {
	t := torture.NewTar()
	for line := range strings.SplitSeq(strings.Trim(lines, "\n"), "\n") {
		part := append(strings.Fields(line), "", "")
		switch part[0] {
		case "d":
			t.Dir(part[1])
		case "f":
			t.File(part[1], part[2])
		case "l":
			t.Link(part[1], part[2])
		case "s":
			t.Symlink(part[1], part[2])
		}
	}
	return t.Bytes()
}

// listing is the opposite of archiveOf: files with their content and directories, sorted.
func listing(t *testing.T, root string) string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(root, path)
		switch {
		case err != nil || name == ".":
			return err
		case d.IsDir():
			all = append(all, name+"/")
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			all = append(all, name+">"+target)
			return err
		default:
			content, err := os.ReadFile(path)
			all = append(all, name+"="+string(content))
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, " ")
}

func TestMerge(t *testing.T) {
	for name, test := range map[string]struct {
		layers []string
		want   string
	}{
		"whiteout hides only older layers": {
			[]string{"f a old\nf b old", "f .wh.a\nf a new\nf b new\nf .wh.b"}, "a=new b=new"},
		"whiteout of a directory with files of its own layer": {
			[]string{"d a\nf a/old x", "f a/new y\nf .wh.a"}, "a/ a/new=y"},
		"opaque marker after the files": {
			[]string{"d a\nf a/old x\nd a/b\nf a/b/old x", "d a\nf a/!first 1\nf a/b/new 2\nf a/.wh..wh..opq\nf a/zlast 3"},
			"a/ a/!first=1 a/b/ a/b/new=2 a/zlast=3"},
		"opaque root": {[]string{"f a x\nd b\nf b/c x", "f .wh..wh..opq\nf d y"}, "d=y"},
		"directory, file, directory": {
			[]string{"d a\nf a/old x", "f a file", "d a\nf a/new y"}, "a/ a/new=y"},
		"directory, file, directory in one layer": {
			[]string{"d a\nf a/old x\nf a file\nd a\nf a/new y"}, "a/ a/new=y"},
		"last of duplicates wins": {[]string{"f a 1\nf b x\nf a 2"}, "a=2 b=x"},
		"hard link across layers": {
			[]string{"f a x", "l b a", "f a y", "f .wh.a"}, "b=x"},
		"hard link to itself":          {[]string{"f a x\nl a a"}, "a=x"},
		"hard link to a symlink":       {[]string{"f a x\ns s a\nl t s"}, "a=x s>a t>a"},
		"hard link over its old self":  {[]string{"f a x\nf b y", "l b a"}, "a=x b=x"},
		"whiteout keeps new hard link": {[]string{"f a x\nf b y", "l b a\nf .wh.b"}, "a=x b=x"},
		"parents out of the root":      {[]string{"f ../../a x\nf b/../../../c y\nf /d z"}, "a=x c=y d=z"},
		"symlinked parent":             {[]string{"d usr\ns lib usr\nf lib/a x", "f lib/b y"}, "lib>usr usr/ usr/a=x usr/b=y"},
		"symlinked parent out of the root": {
			[]string{"s up ../../../../tmp\ns abs /etc\nf up/a x\nf abs/b y"}, "abs>/etc etc/ etc/b=y tmp/ tmp/a=x up>../../../../tmp"},
		"file of an older layer as parent": {[]string{"f a x", "f a/b y"}, "a/ a/b=y"},
		"symlink replaced by directory":    {[]string{"d b\nf b/x 1\ns a b", "d a\nf a/y 2"}, "a/ a/y=2 b/ b/x=1"},
		"whiteout through a symlink":       {[]string{"d b\nf b/x 1\nf b/y 1\ns a b", "f a/.wh.x"}, "a>b b/ b/y=1"},
		"aufs leftovers":                   {[]string{"d .wh..wh.plnk\nf .wh..wh.plnk/1.2 x\nf .wh..wh.aufs x\nf a x"}, "a=x"},
		"whiteout in a directory not there": {
			[]string{"f a x", "f d/.wh.x"}, "a=x"},
		"nothing": {[]string{""}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, layer := range test.layers {
				layers = append(layers, archiveOf(layer))
			}
			if got := listing(t, mount(t, build(t, layers...))); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	raw := func(hdr tar.Header) []byte {
		b := torture.NewTar()
		b.Add(hdr, "")
		return b.Bytes()
	}
	for name, test := range map[string]struct {
		layer []byte
		kind  func(error) bool
	}{
		"not a tar":                        {bytes.Repeat([]byte("caisson "), 200), errdefs.IsInvalidArgument},
		"cut short":                        {archiveOf("f a " + strings.Repeat("x", 3000))[:1500], errdefs.IsInvalidArgument},
		"hard link missing":                {archiveOf("l a b"), errdefs.IsInvalidArgument},
		"hard link to dir":                 {archiveOf("d b\nl a b"), errdefs.IsInvalidArgument},
		"hard link to root":                {archiveOf("l a /"), errdefs.IsInvalidArgument},
		"hard link in place of its target": {archiveOf("d a\nf a/b x\nl a a/b"), errdefs.IsInvalidArgument},
		"file as parent":                   {archiveOf("f a x\nf a/b y"), errdefs.IsInvalidArgument},
		"symlink loop":                     {archiveOf("s a b\ns b a\nf a/x y"), errdefs.IsInvalidArgument},
		"symlinks that grow":               {archiveOf("s a " + strings.Repeat("a/", 2000) + "\nf a/x y"), errdefs.IsInvalidArgument},
		"long name":                        {archiveOf("f " + strings.Repeat("n", 256) + " x"), errdefs.IsInvalidArgument},
		"long path":                        {archiveOf("f " + strings.Repeat("n/", 2100) + "x x"), errdefs.IsInvalidArgument},
		"whiteout of parent":               {archiveOf("d a\nf a/.wh..."), errdefs.IsInvalidArgument},
		"whiteout of itself":               {archiveOf("d a\nf a/.wh.."), errdefs.IsInvalidArgument},
		"whiteout of nothing":              {archiveOf("d a\nf a/.wh."), errdefs.IsInvalidArgument},
		"root as file":                     {raw(tar.Header{Name: "."}), errdefs.IsInvalidArgument},
		"unknown type":                     {raw(tar.Header{Name: "a", Typeflag: 'Z'}), errdefs.IsInvalidArgument},
		"long symlink":                     {raw(tar.Header{Name: "a", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("x", 4096)}), errdefs.IsInvalidArgument},
		"empty symlink":                    {raw(tar.Header{Name: "a", Typeflag: tar.TypeSymlink}), errdefs.IsInvalidArgument},
		"owner out of range":               {raw(tar.Header{Name: "a", Uid: 1 << 32}), errdefs.IsInvalidArgument},
		"device out of range":              {raw(tar.Header{Name: "a", Typeflag: tar.TypeChar, Devmajor: 1 << 12}), errdefs.IsInvalidArgument},
		"too many files":                   {archiveOf(strings.Repeat("f a x\nd b\n", 1) + "f c x\nf d x\nf e x\nf g x"), errdefs.IsResourceExhausted},
		"too much content":                 {archiveOf("f a " + strings.Repeat("x", 200_000)), errdefs.IsResourceExhausted},
		"too much metadata":                {raw(tar.Header{Name: "a", PAXRecords: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 40_000)}}), errdefs.IsResourceExhausted},
		"long attribute":                   {raw(tar.Header{Name: "a", PAXRecords: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 1<<16)}}), errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(t.TempDir(), "image"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			w := NewWriter(f, [16]byte{}, Limits{Content: 100_000, Entries: 5, Memory: 30_000})
			err = add(t.Context(), w, test.layer)
			if !test.kind(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestLimitsOfAllLayers has layers that keep within the limits each, and do not together.
func TestLimitsOfAllLayers(t *testing.T) {
	attribute := func(name string) []byte {
		b := torture.NewTar()
		b.Add(tar.Header{Name: name, PAXRecords: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 20_000)}}, "")
		return b.Bytes()
	}
	for name, layers := range map[string][2][]byte{
		"files":    {archiveOf("f a x\nf b x\nf c x"), archiveOf("f d x\nf e x\nf f x")},
		"one file": {archiveOf("f a x\nf a x\nf a x"), archiveOf("f a x\nf a x\nf a x")},
		"no files": {archiveOf("f .wh..wh.aufs x\nf .wh.a x\nf .wh.b x"), archiveOf("f .wh..wh.aufs x\nf .wh.a x\nf .wh.b x")},
		"steps":    {archiveOf("f a/b/c/x x"), archiveOf(strings.Repeat("f a/b/c/.wh.x x\n", 4))},
		"links":    {archiveOf("d d\ns d/s .///////////////////."), archiveOf("f d/s/x x")},
		"content":  {archiveOf("f a " + strings.Repeat("x", 60_000)), archiveOf("f b " + strings.Repeat("x", 60_000))},
		"metadata": {attribute("a"), attribute("b")},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(t.TempDir(), "image"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			w := NewWriter(f, [16]byte{}, Limits{Content: 100_000, Entries: 5, Steps: 24, Memory: 30_000})
			if err := add(t.Context(), w, layers[0]); err != nil {
				t.Fatal(err)
			}
			if err := add(t.Context(), w, layers[1]); !errdefs.IsResourceExhausted(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("the pull was given up")
	cancel(why)
	w := NewWriter(nil, [16]byte{}, Limits{})
	if err := add(ctx, w, archiveOf("f a x")); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}

func TestSameLayersSameBytes(t *testing.T) {
	layers := [][]byte{archiveOf("d b\nf b/x 1\nf a 2\nf c 3\nd z"), archiveOf("d b\nf b/.wh..wh..opq\nf b/y 2")}
	var images [2][]byte
	for i := range images {
		image, err := os.ReadFile(buildInTurn(t, layers...))
		if err != nil {
			t.Fatal(err)
		}
		images[i] = image
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("two images of the same layers differ")
	}
}

func TestReplacedContentGivesItsSpaceBack(t *testing.T) {
	big := torture.NewTar()
	big.File("big", torture.Noise(8<<20, 1))
	image := build(t, big.Bytes(), archiveOf("f .wh.big"))
	var st unix.Stat_t
	if err := unix.Stat(image, &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > 1<<20 {
		t.Errorf("an image without a file takes %d bytes", st.Blocks*512)
	}
}

func TestOverlayAttributesAreLeftOut(t *testing.T) {
	b := torture.NewTar()
	b.Add(tar.Header{Name: "d/", Typeflag: tar.TypeDir, PAXRecords: map[string]string{
		"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.overlay.redirect": "/", "SCHILY.xattr.system.nfs4_acl": "x",
		"SCHILY.xattr.user.kept": "1"}}, "")
	if got := xattrsOf(t, filepath.Join(mount(t, build(t, b.Bytes())), "d")); strings.Count(got, "=") != 1 || !strings.HasPrefix(got, "user.kept=") {
		t.Errorf("got %s", got)
	}
}

// FuzzLayers feeds archives that may be anything: whatever they hold, there is an image or an error.
func FuzzLayers(f *testing.F) {
	f.Add(archiveOf("d a\nf a/b x\nl c a/b\ns s a\nf s/d y\nf a/.wh..wh..opq\nf .wh.c"), []byte{})
	f.Add(archiveOf("f a x"), archiveOf("f a/b y\nf .wh.a\nd a"))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		file, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		w := NewWriter(file, [16]byte{}, Limits{Content: 1 << 20, Entries: 1000, Memory: 1 << 20})
		for _, layer := range [][]byte{first, second} {
			if err := add(t.Context(), w, layer); err != nil {
				return
			}
		}
		if _, err := w.Finish(); err != nil {
			t.Fatal(err)
		}
	})
}
