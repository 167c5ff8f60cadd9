package guestimage

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
)

// program is what is needed of the packages around a dynamically linked program.
type program struct {
	files map[string][]byte // of all packages seen so far: programs and libraries by name
	links map[string]string
	used  []deb
}

// load reads a package's programs and libraries.
func (p *program) load(ctx context.Context, cache string, d deb) error {
	file, err := download(ctx, cache, d)
	if err != nil {
		return err
	}
	return unpack(ctx, file, func(name string, h *tar.Header, r io.Reader) error {
		if !strings.HasPrefix(name, "lib") && !strings.HasPrefix(name, "bin/") {
			return nil
		}
		switch h.Typeflag {
		case tar.TypeReg:
			data, err := io.ReadAll(r)
			p.files[name] = data
			return err
		case tar.TypeSymlink:
			target := h.Linkname
			if !path.IsAbs(target) {
				target = path.Join("/", path.Dir(name), target)
			}
			target = strings.TrimPrefix(strings.TrimPrefix(path.Clean(target), "/"), "usr/")
			p.links[name] = target
		}
		return nil
	})
}

// read follows links.
func (p *program) read(name string) ([]byte, bool) {
	for range 8 {
		if data, ok := p.files[name]; ok {
			return data, true
		}
		target, ok := p.links[name]
		if !ok {
			return nil, false
		}
		name = target
	}
	return nil, false
}

// libraryDirs is where the dynamic linker looks without a cache.
var libraryDirs = []string{"lib/x86_64-linux-gnu/", "lib/", "lib64/"}

// missing adds the program, its interpreter and libraries to the tree, and returns the libraries
// that no package seen so far has.
func (p *program) missing(t tree, name string) ([]string, error) {
	todo := []string{name}
	done := make(map[string]bool)
	var missing []string
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		if done[name] {
			continue
		}
		done[name] = true
		data, ok := p.find(t, name)
		if !ok {
			missing = append(missing, name)
			continue
		}
		needs, err := needed(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if i := slices.Index(needs, systemd); i >= 0 {
			library, err := stub(data, systemd)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			t.file(libraryDirs[0]+systemd, 0o755, library)
			needs = slices.Delete(needs, i, i+1)
		}
		todo = append(todo, needs...)
	}
	return missing, nil
}

// find puts a file named by its path, or a library by its soname, into the tree.
func (p *program) find(t tree, name string) ([]byte, bool) {
	names := []string{name}
	if !strings.Contains(name, "/") {
		names = nil
		for _, dir := range libraryDirs {
			names = append(names, dir+name)
		}
	}
	for _, name := range names {
		if data, ok := p.read(name); ok {
			t.file(name, 0o755, data)
			return data, true
		}
	}
	return nil, false
}

// needed lists the libraries and the interpreter an ELF file names.
func needed(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	needs, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP && p.Filesz < 4096 {
			interp, err := io.ReadAll(p.Open())
			if err != nil {
				return nil, err
			}
			needs = append(needs, strings.Trim(string(interp), "/\x00"))
		}
	}
	return needs, nil
}

// addProgram adds a program of a Debian package to the tree, with the libraries that it needs from
// the packages it depends on, and returns the packages that were read.
func addProgram(ctx context.Context, t tree, cache, name string, root deb) ([]deb, error) {
	p := &program{files: make(map[string][]byte), links: make(map[string]string)}
	seen := map[string]bool{root.name: true}
	next := []deb{root}
	for {
		wanted := make(map[string]bool)
		for _, d := range next {
			if err := p.load(ctx, cache, d); err != nil {
				return nil, err
			}
			p.used = append(p.used, d)
			for _, dep := range d.depends {
				if !seen[dep] {
					seen[dep], wanted[dep] = true, true
				}
			}
		}
		missing, err := p.missing(t, name)
		if err != nil || len(missing) == 0 {
			return p.used, err
		}
		if len(wanted) == 0 {
			return nil, fmt.Errorf("no dependency of %s has %s", root.name, strings.Join(missing, ", "))
		}
		if next, err = candidates(ctx, slices.Sorted(maps.Keys(wanted))...); err != nil {
			return nil, err
		}
	}
}
