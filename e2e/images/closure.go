package images

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// libraryDirs are where the dynamic linker looks.
var libraryDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64"}

// closure returns the programs (absolute paths inside root) and all that the dynamic linker loads
// for them, itself included. Symbolic links on the way are part of it.
func closure(root string, programs ...string) ([]string, error) {
	found := map[string]bool{}
	queue := slices.Clone(programs)
	for len(queue) > 0 {
		file := queue[0]
		queue = queue[1:]
		if found[file] {
			continue
		}
		found[file] = true
		if target, err := os.Readlink(filepath.Join(root, file)); err == nil {
			if !path.IsAbs(target) {
				target = path.Join(path.Dir(file), target)
			}
			queue = append(queue, target)
			continue
		}
		needed, err := needs(filepath.Join(root, file))
		if err != nil {
			return nil, fmt.Errorf("libraries of %s: %w", file, err)
		}
		for _, library := range needed {
			at, err := resolve(root, library)
			if err != nil {
				return nil, fmt.Errorf("libraries of %s: %w", file, err)
			}
			queue = append(queue, at)
		}
	}
	all := make([]string, 0, len(found))
	for file := range found {
		all = append(all, file)
	}
	slices.Sort(all)
	return all, nil
}

// needs lists the libraries and the interpreter that an ELF file names.
func needs(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	libraries, err := f.ImportedLibraries()
	if err != nil && !errors.Is(err, elf.ErrNoSymbols) {
		return nil, err
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		interpreter, err := io.ReadAll(p.Open())
		if err != nil {
			return nil, err
		}
		libraries = append(libraries, strings.TrimRight(string(interpreter), "\x00"))
	}
	return libraries, nil
}

func resolve(root, library string) (string, error) {
	if path.IsAbs(library) {
		return library, nil
	}
	for _, dir := range libraryDirs {
		at := path.Join(dir, library)
		if _, err := os.Lstat(filepath.Join(root, at)); err == nil {
			return at, nil
		}
	}
	return "", fmt.Errorf("%s is in none of the packages", library)
}
