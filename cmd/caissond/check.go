package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/network"
	"github.com/caisson-vm/caisson/podvm/guestimage"
	"github.com/caisson-vm/caisson/podvm/vmm/cloudhv"
)

// finding is what check says of one thing. Without err it is fine; with warn a node runs pods all
// the same.
type finding struct {
	name, detail string
	err          error
	warn         bool
}

// check looks at all that the daemon needs of the node, and says for each thing that is not right
// how to mend it.
func check(ctx context.Context, args []string) error {
	c, err := configFlag("check", args)
	if err != nil {
		return err
	}
	bad := 0
	for _, look := range []func(context.Context, Config) finding{checkGuest, checkDriver, checkCloudHV, checkTUN, checkCNI, checkCgroup, checkFormat, checkDisk} {
		f := look(ctx, c)
		mark := "ok  "
		switch {
		case f.err != nil && f.warn:
			mark = "warn"
		case f.err != nil:
			mark = "FAIL"
			bad++
		}
		if f.err != nil {
			f.detail = f.err.Error()
		}
		fmt.Printf("%s  %-18s %s\n", mark, f.name, f.detail)
	}
	if bad > 0 {
		return fmt.Errorf("%d of the above keep pods from running", bad)
	}
	return nil
}

func checkGuest(_ context.Context, c Config) finding {
	g, err := guestimage.Open(c.Guest)
	return finding{name: "guest", detail: fmt.Sprintf("version %s in %s", g.Version, g.Dir), err: err}
}

// checkDriver boots a guest, as auto does.
func checkDriver(ctx context.Context, c Config) finding {
	f := finding{name: "virtual machines"}
	g, err := guestimage.Open(c.Guest)
	if err != nil {
		f.err = errors.New("can't be tried without a guest")
		return f
	}
	found, err := chooseDriver(ctx, c, g, true)
	if err != nil {
		f.err = err
		return f
	}
	f.detail = fmt.Sprintf("%s %s: %s", found.driver.Name(), found.driver.Version(), found.reason)
	switch {
	case c.Driver == cloudhv.Name: // who configures it is believed, but for here
		f.err = probe(ctx, c, g, found.driver, true)
	case !found.driver.KVM():
		f.warn, f.err = true, fmt.Errorf("%s; pods run, and take many times as long for everything", f.detail)
		if !strings.Contains(found.reason, mendDevice) {
			f.err = fmt.Errorf("%w: %s", f.err, mendDevice)
		}
		f.err = fmt.Errorf("%w; then start caissond again", f.err)
	}
	return f
}

func checkCloudHV(ctx context.Context, c Config) finding {
	d, err := cloudhv.New(ctx, c.VM.CloudHV)
	if err != nil {
		return finding{name: "cloud hypervisor", err: err, warn: true}
	}
	defer d.Close()
	return finding{name: "cloud hypervisor", detail: d.Version()}
}

func checkTUN(context.Context, Config) finding {
	f := finding{name: "tap devices", detail: "/dev/net/tun opens"}
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		f.err = fmt.Errorf("%w: load the module tun", err)
		return f
	}
	tun.Close()
	return f
}

func checkCNI(ctx context.Context, c Config) finding {
	return finding{name: "CNI", detail: "configured in " + c.CNI.ConfDir, err: network.New(networkOptions(c)).Status(ctx)}
}

func checkCgroup(context.Context, Config) finding {
	var fs unix.Statfs_t
	f := finding{name: "cgroup v2", detail: "mounted on /sys/fs/cgroup", warn: true}
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		f.err = errors.New("/sys/fs/cgroup is not cgroup v2: pods run, but their VMs count against no cgroup; boot with systemd.unified_cgroup_hierarchy=1")
	}
	return f
}

func checkFormat(context.Context, Config) finding {
	path, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		return finding{name: "mkfs.ext4", err: errors.New("not in PATH: install e2fsprogs, for the pods' scratch disks")}
	}
	return finding{name: "mkfs.ext4", detail: path}
}

func checkDisk(_ context.Context, c Config) finding {
	const enough = 2 << 30
	f := finding{name: "disk"}
	dir := c.Root
	for {
		if _, err := os.Stat(dir); err == nil || dir == "/" {
			break
		}
		dir = filepath.Dir(dir)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		f.err = err
		return f
	}
	free := fs.Bavail * uint64(fs.Bsize)
	f.detail = fmt.Sprintf("%d MiB free for %s", free>>20, c.Root)
	if free < enough {
		f.err = fmt.Errorf("%d MiB free for %s: make it 2 GiB or more, for images and the template", free>>20, c.Root)
	} else if fs.Type == unix.TMPFS_MAGIC {
		f.warn, f.err = true, fmt.Errorf("%s is in memory (tmpfs), where also what pods only read takes room, and which a reboot empties: put it on a disk", c.Root)
	}
	return f
}
