package passthrough

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestUnsized reads and writes files of the host's kernel, which have no sizes.
func TestUnsized(t *testing.T) {
	mnt, host := mounted(t)
	for fstype, names := range map[string][]string{
		"proc":    {"version", "meminfo", "kallsyms", "self/status", "self/comm"},
		"cgroup2": {"cgroup.controllers", "cgroup.procs"},
		"sysfs":   {"kernel/uevent_seqnum"},
		"tracefs": {"available_tracers", "trace"},
		"debugfs": {"sleep_time"},
	} {
		ok(t, os.Mkdir(host+"/"+fstype, 0o755))
		err := unix.Mount(fstype, host+"/"+fstype, fstype, 0, "")
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EBUSY) {
			t.Logf("this kernel has no %s", fstype)
			continue
		}
		ok(t, err)
		t.Cleanup(func() { ok(t, unix.Unmount(host+"/"+fstype, unix.MNT_DETACH)) })
		for _, name := range names {
			name = fstype + "/" + name
			want, err := os.ReadFile(host + "/" + name)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			got := must(os.ReadFile(mnt + "/" + name))(t)
			if err != nil || len(want) == 0 {
				t.Fatalf("the host's %s has %d bytes, %v", name, len(want), err)
			}
			// Of some the figures change all the time.
			if len(got) < len(want)*3/4 || !bytes.Equal(got[:2], want[:2]) {
				t.Errorf("%s has %d bytes, %.20q; want %d, %.20q", name, len(got), got, len(want), want)
			}
		}
	}
	score := fmt.Sprintf("/proc/%d/oom_score_adj", os.Getpid())
	before := must(os.ReadFile(score))(t)
	defer os.WriteFile(score, before, 0)
	ok(t, os.WriteFile(mnt+score, []byte("777"), 0))
	content(t, score, "777\n")
	// Others keep their cache.
	ok(t, os.WriteFile(mnt+"/empty", nil, 0o600))
	content(t, mnt+"/empty", "")
	empty := must(os.Open(host + "/empty"))(t)
	defer empty.Close()
	if unsized(int(empty.Fd())) {
		t.Error("an empty file of a disk is taken for one without a size")
	}
}
