package images

import (
	"archive/tar"
	"context"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// TortureDir is where the torture image keeps all that is odd about it.
const TortureDir = "torture"

// capNetRaw is the file capability cap_net_raw+ep as the kernel stores it (struct vfs_cap_data,
// revision 2).
const capNetRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// torture is an image of four layers in which all that layers can do to one another happens.
func torture(_ context.Context, _ string, b *base) ([]Image, error) {
	layers := []v1.Layer{b.layer}
	for i, l := range tortureLayers() {
		c := compression.GZip
		if i == 1 {
			c = compression.ZStd
		}
		layer, err := l.Build(c)
		if err != nil {
			return nil, err
		}
		layers = append(layers, layer)
	}
	single, err := image(busybox(), types.OCIManifestSchema1, layers...)
	if err != nil {
		return nil, err
	}
	return []Image{{Refs: []string{Torture}, Single: single}}, nil
}

func tortureLayers() []*Layer {
	bottom := tortureBottom()
	return []*Layer{bottom, tortureMiddle(bottom), tortureTop()}
}

func tortureBottom() *Layer {
	l := &Layer{}
	l.Dir(TortureDir, 0o755)
	at := func(name string) string { return path.Join(TortureDir, name) }
	for i := range 1500 {
		l.File(at(fmt.Sprintf("many/file-%04d", i)), 0o644, fmt.Sprintln(i))
	}
	l.File(at("link/first"), 0o640, "one file, several names\n")
	l.Link(at("link/second"), at("link/first")).Link(at("elsewhere/third"), at("link/first"))
	l.Symlink(at("symlink/absolute"), "/etc/passwd").Symlink(at("symlink/dangling"), strings.Repeat("x/", 100)+"y")
	l.File(at("mode/setuid"), 0o4755, "").File(at("mode/setgid"), 0o2755, "").File(at("mode/none"), 0, "")
	l.Dir(at("mode/sticky"), 0o1777)
	l.File(at("name/with space"), 0o644, "").File(at("name/größe-✓"), 0o644, "").File(at("name/"+strings.Repeat("n", 255)), 0o644, "")
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: at("owner/large"), Mode: 0o600, Uid: 100000, Gid: 4000000000}, []byte("x"))
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: at("time/old"), Mode: 0o644, ModTime: time.Unix(1, 0)}, nil)
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: at("time/exact"), Mode: 0o644, ModTime: time.Unix(1600000000, 123456789)}, nil)
	l.add(tar.Header{Typeflag: tar.TypeFifo, Name: at("special/fifo"), Mode: 0o600}, nil)
	l.add(tar.Header{Typeflag: tar.TypeChar, Name: at("special/null"), Mode: 0o666, Devmajor: 1, Devminor: 3}, nil)
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: at("xattr/ping"), Mode: 0o755, PAXRecords: map[string]string{
		"SCHILY.xattr.security.capability": capNetRaw, "SCHILY.xattr.user.origin": "bottom",
	}}, []byte("capable\n"))
	l.File(at("zeros"), 0o644, strings.Repeat("\x00", 4<<20)+"end\n").File(at("empty"), 0o644, "")
	for _, name := range []string{"gone/file", "gone/dir/inner", "opaque/hidden", "opaque/sub/hidden", "becomes-file/child", "reborn/old", "kept/below"} {
		l.File(at(name), 0o644, name+" of the bottom\n")
	}
	return l.File(at("becomes-dir"), 0o644, "a file\n").File(at("overwritten"), 0o600, "bottom\n").Dir(at("dir-mode"), 0o700)
}

func tortureMiddle(bottom *Layer) *Layer {
	l := &Layer{}
	at := func(name string) string { return path.Join(TortureDir, name) }
	l.Whiteout(at("gone/file")).Whiteout(at("gone/dir")).Whiteout(at("reborn")).Whiteout(at("never-was"))
	l.File(at("opaque/a-before-the-marker"), 0o644, "new\n").Opaque(at("opaque")).File(at("opaque/shown"), 0o644, "new\n")
	l.File(at("becomes-file"), 0o644, "a file now\n").File(at("becomes-dir/child"), 0o644, "a directory now\n")
	l.File(at("overwritten"), 0o644, "middle\n").Dir(at("dir-mode"), 0o750)
	l.Link(at("link/across-layers"), at("link/first"), bottom)
	return l.File(at("kept/above"), 0o644, "middle\n")
}

func tortureTop() *Layer {
	l := &Layer{}
	at := func(name string) string { return path.Join(TortureDir, name) }
	l.File(at("reborn/new"), 0o644, "top\n")
	l.Whiteout(at("becomes-file")).Dir(at("becomes-file-again"), 0o755)
	l.Whiteout(at("many/file-0007"))
	return l.Whiteout(at("link/second"))
}

// TortureFiles is what must be found below TortureDir, by name without a leading slash; hard links
// carry the entry of the file they are a link to. It is worked out from the layers by itself.
func TortureFiles() map[string]Entry {
	return flatten(tortureLayers())
}

// flatten applies layers to one another as the OCI image specification says: first a layer's
// whiteouts, which reach only lower layers, then its entries.
func flatten(layers []*Layer) map[string]Entry {
	files := map[string]Entry{}
	remove := func(name string, self bool) {
		for have := range files {
			if self && have == name || strings.HasPrefix(have, name+"/") {
				delete(files, have)
			}
		}
	}
	for _, l := range layers {
		for _, e := range l.Entries {
			dir, file := path.Split(e.Name)
			switch {
			case file == ".wh..wh..opq":
				remove(strings.TrimSuffix(dir, "/"), false)
			case strings.HasPrefix(file, ".wh."):
				remove(dir+strings.TrimPrefix(file, ".wh."), true)
			}
		}
		for _, e := range l.Entries {
			name := strings.TrimSuffix(e.Name, "/")
			if strings.HasPrefix(path.Base(name), ".wh.") {
				continue
			}
			if e.Typeflag == tar.TypeLink {
				e = files[e.Linkname]
			}
			if e.Typeflag != tar.TypeDir || files[name].Typeflag != tar.TypeDir {
				remove(name, true)
			}
			files[name] = e
		}
	}
	return files
}
