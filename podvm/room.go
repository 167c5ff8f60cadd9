package podvm

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// vmmMemory is what a VMM needs beside a guest of this size, in bytes, with the process that serves host
// directories and the node's kernel, whose tables of a guest's pages take a 256th of them.
func vmmMemory(guest int64) int64 { return 32<<20 + guest/128 }

// makeRoom raises the memory limits of the cgroup that the kubelet made for a pod: it is what the containers may
// use, and the RuntimeClass's overhead, where there is one. The VM takes more than they, and the guest holds them
// to their limits: without room the node would end the VM where one container has reached its own, and slow it
// down from where the kubelet wants them slowed down (memory.high). A limit below the kubelet's is somebody's who
// means it.
func (p *Pod) makeRoom(c PodConfig) {
	want, group := p.room(c), p.record.now().VM.Cgroup
	if group == "" || want == 0 {
		return
	}
	dir := filepath.Dir(group)
	now, err := readLimit(filepath.Join(dir, "memory.max"))
	if err == nil && now < c.memoryMax()-pageSize { // limits are whole pages
		return
	}
	for _, name := range []string{"memory.max", "memory.high"} {
		if err == nil {
			err = raise(filepath.Join(dir, name), want)
		}
	}
	if err != nil {
		slog.Warn("no room for the VM in the pod's cgroup", "pod", p.id, "err", err)
	}
}

// raise makes a limit that is lower the one that is wanted.
func raise(file string, want int64) error {
	now, err := readLimit(file)
	if err != nil || now >= want {
		return err
	}
	return os.WriteFile(file, strconv.AppendInt(nil, want, 10), 0)
}

var pageSize = int64(os.Getpagesize())

// room is how much memory the pod's cgroup is to have room for, in whole pages; 0 where it has no limit. A VM is
// as large as it was started with at least, and its guest keeps what it has read in all of that.
func (p *Pod) room(c PodConfig) int64 {
	if c.Resources == nil || c.Resources.Memory <= 0 {
		return 0
	}
	guest := max(c.withGuest(c.Resources.Memory), p.record.now().VM.Size.Memory)
	return (guest + vmmMemory(guest) + pageSize - 1) / pageSize * pageSize
}

// memoryMax is the kubelet's limit for the pod's cgroup.
func (c PodConfig) memoryMax() int64 {
	if c.Overhead != nil {
		return c.Resources.Memory + max(c.Overhead.Memory, 0)
	}
	return c.Resources.Memory
}

// withoutRoom are resources of the pod as the kubelet means them: it reads the limit that it does not change back
// from the cgroup, where makeRoom has raised it, and takes the overhead off.
func (p *Pod) withoutRoom(r Resources) *Resources {
	old := p.record.now().Config
	if room := p.room(old); room > 0 && r.Memory == room-(old.memoryMax()-old.Resources.Memory) {
		r.Memory = old.Resources.Memory
	}
	return &r
}

// memoryCapped tells whether the cgroup that a pod's VMM is below has a limit of memory. The kubelet sets one
// where all containers of the pod's manifest have a limit, or the pod as a whole. A guest with more memory than
// that would have its VM killed for using it, for the sake of a container that came later (kubectl debug).
func memoryCapped(cgroup string) bool {
	if cgroup == "" {
		return false
	}
	limit, err := readLimit(filepath.Join(filepath.Dir(cgroup), "memory.max"))
	return err == nil && limit != unlimited
}

// unlimited is what readLimit returns for "max".
const unlimited = 1<<63 - 1

func readLimit(file string) (int64, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	text := strings.TrimSpace(string(data))
	if text == "max" {
		return unlimited, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	return n, nil
}

// oomKills is how many processes the node's kernel has ended in the kubelet's cgroup of the pod for want of
// memory; 0 where there is none.
func (p *Pod) oomKills() int {
	group := p.record.now().VM.Cgroup
	if group == "" {
		return 0
	}
	n, err := readEvent(filepath.Join(filepath.Dir(group), "memory.events"), "oom_kill")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		slog.Warn("whether the node ran out of memory for a pod", "pod", p.id, "err", err)
	}
	return n
}

// readEvent reads a line "name number" of a cgroup's file; 0 where there is none.
func readEvent(file, name string) (int, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if key, value, _ := strings.Cut(strings.TrimSpace(line), " "); key == name {
			return strconv.Atoi(value)
		}
	}
	return 0, nil
}
