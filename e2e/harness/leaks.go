package harness

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// Snapshot is what there is in the suite's namespaces, and of the machine what Caisson can reach,
// at one moment: each thing as a line for a person to read.
type Snapshot map[string]bool

// Look looks for processes, network links, network namespaces, mounts, cgroups, loop devices, iptables
// rules, shared memory segments and temporary files.
func Look() (Snapshot, error) {
	s := Snapshot{}
	for _, look := range []func() ([]string, error){processes, links, mounts, cgroups, loops, rules, segments, files} {
		found, err := look()
		if err != nil {
			return nil, fmt.Errorf("look for leaks: %w", err)
		}
		for _, line := range found {
			s[line] = true
		}
	}
	return s, nil
}

// TakeSnapshot is Look for a test.
func TakeSnapshot(t testing.TB) Snapshot {
	t.Helper()
	s, err := Look()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Since lists what there is now and was not before, sorted.
func (s Snapshot) Since(before Snapshot) []string {
	var fresh []string
	for _, line := range slices.Sorted(maps.Keys(s)) {
		if !before[line] {
			fresh = append(fresh, line)
		}
	}
	return fresh
}

// NotWaitedFor ends the line of a process that has ended and whose parent has not noticed.
const NotWaitedFor = ", ended but not waited for, or of the kernel"

// processes lists all of the PID namespace but the tests' own.
func processes() ([]string, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 || pid == os.Getpid() {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue // it has ended
		}
		line := strings.TrimSpace(string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		if line == "" {
			comm, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
			line = "[" + strings.TrimSpace(string(comm)) + "]" + NotWaitedFor
		}
		found = append(found, fmt.Sprintf("process %d: %.200s", pid, line))
	}
	return found, nil
}

// links lists network devices but the bridges, which the CNI plugin makes once for all pods.
func links() ([]string, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var found []string
	for _, l := range all {
		if l.Type() != "bridge" {
			found = append(found, fmt.Sprintf("network link %s (%s)", l.Attrs().Name, l.Type()))
		}
	}
	return found, nil
}

// mounts lists mount points, network namespaces kept by a file among them.
func mounts() ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 {
			found = append(found, "mount at "+fields[4])
		}
	}
	return found, nil
}

// podCgroup matches what a cgroup of Caisson's is called: by its own name, or by a pod's id.
var podCgroup = regexp.MustCompile(`caisson|[0-9a-f]{64}`)

func cgroups() ([]string, error) {
	var found []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return fs.SkipDir // it has gone
		}
		if d.IsDir() && podCgroup.MatchString(d.Name()) {
			found = append(found, "cgroup "+path)
		}
		return nil
	})
	return found, err
}

func loops() ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, file := range files {
		if backing, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(backing), os.Getenv(scratchVar)) {
			found = append(found, "loop device of "+strings.TrimSpace(string(backing)))
		}
	}
	return found, nil
}

// podRule matches the chains that the portmap plugin makes for one pod.
var podRule = regexp.MustCompile(`(?m)^:CNI-(?:DN|SN)-\S+`)

func rules() ([]string, error) {
	var found []string
	for _, program := range []string{"iptables-save", "ip6tables-save"} {
		out, err := exec.Command(program).Output()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", program, err)
		}
		for _, chain := range podRule.FindAllString(string(out), -1) {
			found = append(found, "chain of host ports "+chain[1:])
		}
	}
	return found, nil
}

func segments() ([]string, error) {
	data, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] != "key" {
			found = append(found, "shared memory segment "+fields[1])
		}
	}
	return found, nil
}

// files lists temporary files of the suite and what lies in /run, which is its own.
func files() ([]string, error) {
	var found []string
	for _, dir := range []string{os.TempDir(), "/run", "/run/netns"} {
		entries, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			return nil, err
		}
		for _, e := range entries {
			switch name := filepath.Join(dir, e.Name()); name {
			case "/run/netns", "/run/xtables.lock", "/run/mount": // of ip, iptables and mount, once made
			default:
				found = append(found, "file "+name)
			}
		}
	}
	return found, nil
}

// Left lists files of the daemon's that remain although all pods were removed and it has ended:
// all in its state folder, all of pods in its root, and addresses that the CNI still has as taken.
func (d *Daemon) Left() []string {
	var left []string
	for _, place := range []struct {
		dir  string
		keep *regexp.Regexp
	}{
		{d.Config.State, regexp.MustCompile(`^(probe\.json|lock|.*\.lock)$`)},
		{filepath.Join(d.Config.Root, "pods"), nil},
		{filepath.Join(d.Dir, "ipam"), regexp.MustCompile(`^caisson-e2e-\d+/(lock|last_reserved_ip\.\d+)$`)},
	} {
		err := filepath.WalkDir(place.dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return nil
			}
			name, err := filepath.Rel(place.dir, path)
			if err != nil {
				return err
			}
			if place.keep == nil || !place.keep.MatchString(name) {
				left = append(left, path)
			}
			return nil
		})
		if err != nil {
			d.t.Errorf("look for files left: %v", err)
		}
	}
	if pods, err := os.ReadDir(filepath.Join(d.Config.Root, "pods")); err == nil {
		for _, pod := range pods {
			left = append(left, filepath.Join(d.Config.Root, "pods", pod.Name()))
		}
	}
	return left
}
