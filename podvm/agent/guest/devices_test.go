package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestKernelDevices looks at a guest's /dev and /sys.
func TestKernelDevices(t *testing.T) {
	dev, sys := t.TempDir(), t.TempDir()
	for i, d := range []struct {
		name, of string
		block    bool
	}{
		{"fuse", "virtual/misc/fuse", false}, {"net/tun", "virtual/misc/tun", false}, {"loop0", "virtual/block/loop0", true}, {"kmsg", "virtual/mem/kmsg", false},
		{"null", "virtual/mem/null", false}, {"console", "virtual/tty/console", false}, {"pts/0", "virtual/tty/pts0", false},
		{"vda", "pci0000:00/0000:00:02.0/virtio1/block/vda", true}, {"pmem0", "pci0000:00/0000:00:03.0/virtio2/ndbus0/region0/block/pmem0", true},
		{"vport0p1", "pci0000:00/0000:00:04.0/virtio3/virtio-ports/vport0p1", false}, {"ttyS0", "pnp0/00:01/tty/ttyS0", false},
		{"vsock", "virtual/misc/vsock", false}, {"hvc0", "virtual/tty/hvc0", false}, {"unknown", "", false},
	} {
		number, kind, class := i+1, uint32(unix.S_IFCHR), "char"
		if d.block {
			kind, class = unix.S_IFBLK, "block"
		}
		node := filepath.Join(dev, d.name)
		link := filepath.Join(sys, "dev", class, fmt.Sprintf("240:%d", number))
		for _, path := range []string{node, link} {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mknod(node, kind|0o640, int(unix.Mkdev(240, uint32(number)))); err != nil {
			t.Fatal(err)
		}
		if d.of == "" {
			continue
		}
		if err := os.Symlink("../../devices/"+d.of, link); err != nil {
			t.Fatal(err)
		}
	}
	all, err := kernelDevices(dev, sys)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range all {
		got = append(got, fmt.Sprintf("%s %s %d:%d %o", d.Path, d.Type, d.Major, d.Minor, *d.FileMode))
	}
	if want := []string{"/dev/fuse c 240:1 640", "/dev/kmsg c 240:4 640", "/dev/loop0 b 240:3 640", "/dev/net/tun c 240:2 640"}; !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// TestPrivilegedDevices: a container that may use all devices has the guest's, and no other has.
func TestPrivilegedDevices(t *testing.T) {
	ctx, c := startAgent(t)
	own, err := kernelDevices("/dev", "/sys")
	if err != nil || len(own) == 0 {
		t.Fatalf("this machine has none to give: %v", err)
	}
	var names []string
	for _, d := range own {
		names = append(names, d.Path)
	}
	for name, rules := range map[string][]specs.LinuxDeviceCgroup{"privileged": {{Allow: true, Access: "rwm"}}, "usual": {{Allow: false, Access: "rwm"}}} {
		spec := specOf(append([]string{"stat", "-c", "%n"}, names...)...)
		spec.Linux = &specs.Linux{Resources: &specs.LinuxResources{Devices: rules}}
		r, _ := create(t, ctx, c, name, spec, &agent.CreateRequest{})
		r.start()
		out, _ := r.logs()
		if got, all := strings.Fields(out), name == "privileged"; all && !slices.Equal(got, names) || !all && len(got) > 0 {
			t.Errorf("%s: got %q of %q", name, got, names)
		}
		r.remove()
	}
}
