package boot

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// modules loads kernel modules from a folder made by podvm/guestimage: NAME.ko, modules.dep with
// what each needs in the order of loading, modules.alias.
type modules struct{ dir string }

// kernelModules is the folder of the running kernel.
func kernelModules() (modules, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return modules{}, fmt.Errorf("uname: %w", err)
	}
	return modules{"/lib/modules/" + unix.ByteSliceToString(u.Release[:])}, nil
}

// load loads the named modules, and before each what it needs. Those that the folder lacks are
// left out: another kernel may have them built in.
func (m modules) load(names ...string) error {
	needs, err := m.needs(names)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		deps, ok := needs[name]
		if !ok {
			continue
		}
		for _, module := range append(deps, name) {
			if err := m.insert(module); err != nil {
				errs = append(errs, err)
				break
			}
		}
	}
	return errors.Join(errs...)
}

// needs reads the lines of modules.dep about the names.
func (m modules) needs(names []string) (map[string][]string, error) {
	wanted := make(map[string]bool, len(names))
	for _, name := range names {
		wanted[name] = true
	}
	needs := make(map[string][]string, len(names))
	err := lines(filepath.Join(m.dir, "modules.dep"), func(line string) {
		if name, deps, ok := strings.Cut(line, ":"); ok && wanted[name] {
			needs[name] = strings.Fields(deps)
		}
	})
	return needs, err
}

// resolve finds the modules that a name or alias stands for.
func (m modules) resolve(alias string) ([]string, error) {
	name := strings.ReplaceAll(alias, "-", "_")
	if _, err := os.Stat(filepath.Join(m.dir, name+".ko")); err == nil {
		return []string{name}, nil
	}
	var found []string
	err := lines(filepath.Join(m.dir, "modules.alias"), func(line string) {
		pattern, name, ok := strings.Cut(strings.TrimPrefix(line, "alias "), " ")
		if !ok {
			return
		}
		if match, _ := path.Match(pattern, alias); match {
			found = append(found, name)
		}
	})
	return found, err
}

// insert loads one module; one that is loaded already is no error.
func (m modules) insert(name string) error {
	f, err := os.Open(filepath.Join(m.dir, name+".ko"))
	if err != nil {
		return fmt.Errorf("load module: %w", err)
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", name, err)
	}
	return nil
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

// Modprobe is what the kernel runs, as /sbin/modprobe, when it misses a module. The arguments are
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
	if err != nil || len(names) == 0 || m.load(names...) != nil {
		return 1
	}
	return 0
}
