package boot

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pierrec/lz4/v4"
	"golang.org/x/sys/unix"
)

// modules loads kernel modules from a folder made by podvm/guestimage: NAME.ko or NAME.ko.lz4;
// modules.boot, what to load at first; modules.dep, what each needs in the order of loading;
// modules.alias.
type modules struct{ dir string }

// kernelModules is the folder of the running kernel.
func kernelModules() (modules, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return modules{}, fmt.Errorf("uname: %w", err)
	}
	return modules{"/lib/modules/" + unix.ByteSliceToString(u.Release[:])}, nil
}

// boot lists the modules to load at first. A kernel without modules has no such list.
func (m modules) boot() ([]string, error) {
	var names []string
	err := lines(filepath.Join(m.dir, "modules.boot"), func(line string) { names = append(names, line) })
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return names, err
}

// load loads the named modules, and before each what it needs. Those that the folder lacks are
// left out: another kernel may have them built in.
func (m modules) load(names ...string) error {
	needs := make(map[string][]string, len(names))
	for _, name := range names {
		needs[name] = nil
	}
	known := make(map[string]bool, len(names))
	err := lines(filepath.Join(m.dir, "modules.dep"), func(line string) {
		name, deps, _ := strings.Cut(line, ":")
		if _, ok := needs[name]; ok {
			needs[name], known[name] = strings.Fields(deps), true
		}
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var errs []error
	for _, name := range names {
		if !known[name] {
			continue
		}
		for _, module := range append(needs[name], name) {
			if err := m.insert(module); err != nil {
				errs = append(errs, fmt.Errorf("load module %s: %w", module, err))
				break
			}
		}
	}
	return errors.Join(errs...)
}

// insert loads one module; one that is loaded already is no error.
func (m modules) insert(name string) error {
	// The kernel itself would read all of a module before it sees that it has it.
	if _, err := os.Stat("/sys/module/" + name + "/initstate"); err == nil {
		return nil
	}
	err := m.insertFile(filepath.Join(m.dir, name+".ko"))
	if errors.Is(err, fs.ErrNotExist) {
		err = insertPacked(filepath.Join(m.dir, name+".ko.lz4"))
	}
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func (m modules) insertFile(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// insertPacked loads a module from its size (4 bytes, little endian) and one LZ4 block.
func insertPacked(file string) error {
	packed, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if len(packed) < 4 {
		return io.ErrUnexpectedEOF
	}
	data := make([]byte, binary.LittleEndian.Uint32(packed))
	n, err := lz4.UncompressBlock(packed[4:], data)
	if err != nil {
		return err
	}
	return unix.InitModule(data[:n], "")
}

// resolve finds the modules that a name or alias stands for.
func (m modules) resolve(alias string) ([]string, error) {
	name := strings.ReplaceAll(alias, "-", "_")
	for _, suffix := range []string{".ko", ".ko.lz4"} {
		if _, err := os.Stat(filepath.Join(m.dir, name+suffix)); err == nil {
			return []string{name}, nil
		}
	}
	all, err := m.aliases("")
	if err != nil {
		return nil, err
	}
	return match(all, alias), nil
}

// alias maps a pattern (path.Match) to the module that serves what matches.
type alias struct{ pattern, module string }

// aliases lists those that begin with one of the prefixes.
func (m modules) aliases(prefixes ...string) ([]alias, error) {
	var found []alias
	err := lines(filepath.Join(m.dir, "modules.alias"), func(line string) {
		pattern, module, ok := strings.Cut(strings.TrimPrefix(line, "alias "), " ")
		if ok && slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(pattern, p) }) {
			found = append(found, alias{strings.Clone(pattern), strings.Clone(module)})
		}
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return found, err
}

func match(all []alias, name string) []string {
	var found []string
	for _, a := range all {
		literal, _, _ := strings.Cut(a.pattern, "*")
		if !strings.HasPrefix(name, literal[:strings.IndexAny(literal+"[?", "[?")]) {
			continue // much faster than Match, which most aliases don't
		}
		if ok, _ := path.Match(a.pattern, name); ok && !slices.Contains(found, a.module) {
			found = append(found, a.module)
		}
	}
	return found
}

func lines(file string, visit func(line string)) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		visit(s.Text())
	}
	return s.Err()
}

// modprobePath is the agent once more: its main calls Modprobe when run by that name.
const modprobePath = "/modprobe"

// Modprobe is what the kernel runs, as modprobePath, when it misses a module. The arguments are
// modprobe's; all but the last, the module's name or alias, are ignored. It returns the exit code.
func Modprobe(args []string) int {
	if len(args) == 0 {
		return 1
	}
	m, err := kernelModules()
	if err != nil {
		return 1
	}
	names, err := m.resolve(args[len(args)-1])
	if err != nil || len(names) == 0 {
		return 1
	}
	_, untracked := os.Stat(connectionsMax)
	if m.load(names...) != nil {
		return 1
	}
	if untracked != nil {
		if err := connections(); err != nil { // the modules are there all the same
			fmt.Fprintln(os.Stderr, "modprobe:", err)
		}
	}
	return 0
}
