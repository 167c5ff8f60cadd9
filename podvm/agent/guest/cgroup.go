package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	cgroupRoot = "/sys/fs/cgroup"
	// podCgroup holds all containers.
	podCgroup = cgroupRoot + "/pod"
	// podTasks is how many processes and threads the containers may have: some less than the guest
	// can (kernel.threads-max), so that the agent can always start one that ends theirs.
	podTasks = 1_000_000
)

// makePodCgroup makes the parent of the containers' cgroups, with every controller there is.
func makePodCgroup() error {
	if err := os.Mkdir(podCgroup, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make the pod's cgroup: %w", err)
	}
	names, err := os.ReadFile(podCgroup + "/cgroup.controllers")
	if err != nil {
		return fmt.Errorf("list cgroup controllers: %w", err)
	}
	var all []string
	for _, name := range strings.Fields(string(names)) {
		all = append(all, "+"+name)
	}
	if err := os.WriteFile(podCgroup+"/cgroup.subtree_control", []byte(strings.Join(all, " ")), 0); err != nil {
		return fmt.Errorf("give the containers' cgroups their controllers: %w", err)
	}
	if err := os.WriteFile(podCgroup+"/pids.max", []byte(strconv.Itoa(podTasks)), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("bound the pod's processes: %w", err)
	}
	return nil
}

// cgroup is the path of the container's cgroup, from the root of cgroups.
func (c *container) cgroup() string {
	if c.a.o.NoCgroups {
		return ""
	}
	return "/pod/" + c.id
}

func (c *container) cgroupDir() string { return filepath.Join(podCgroup, c.id) }

// oomKills counts processes that were killed for lack of memory.
func (c *container) oomKills() uint64 {
	return keyed(readFile(filepath.Join(c.cgroupDir(), "memory.events")), "oom_kill")
}

// killAll ends all processes of the container at once.
func (c *container) killAll() error {
	if c.a.o.NoCgroups {
		return c.a.reaper.kill(c.proc.pid, c.proc.ended, unix.SIGKILL)
	}
	err := os.WriteFile(filepath.Join(c.cgroupDir(), "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// signalAll sends a signal to all processes of the container.
func (c *container) signalAll(sig unix.Signal) error {
	if sig == unix.SIGKILL {
		return c.killAll()
	}
	if c.a.o.NoCgroups {
		return c.a.reaper.kill(c.proc.pid, c.proc.ended, sig)
	}
	return filepath.WalkDir(c.cgroupDir(), func(dir string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return nil // a cgroup that ends meanwhile
		}
		for _, field := range strings.Fields(readFile(filepath.Join(dir, "cgroup.procs"))) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
				if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
					return err
				}
			}
		}
		return nil
	})
}

// readFile reads a file of the kernel's; one that can't be read is empty.
func readFile(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return ""
	}
	return string(b)
}

// keyed finds the number of a key in lines of "key number".
func keyed(text, key string) uint64 {
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k == key {
			return number(v)
		}
	}
	return 0
}

// number reads a number; "max", and what is none, is 0.
func number(s string) uint64 {
	n, err := strconv.ParseUint(strings.TrimSpace(s), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
