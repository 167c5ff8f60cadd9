package vmmtest

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// attach finds a VM whose owner died, and does all that one does to a VM with it.
func (s *suite) attach(t *testing.T) {
	c, d := s.config(t, "orphan"), s.newDriver(t)
	sweep(t, d, c)
	bootID, address := orphan(t, c, s.image)
	v, err := d.Attach(limited(t, callLimit), c)
	if err != nil {
		t.Fatal(err)
	}
	g := inside(t, v)
	ctx := limited(t, callLimit)
	// A second Setup is answered as the first was.
	if again, err := g.setup(ctx, c.ID); err != nil || again != bootID {
		t.Fatalf("set up what was set up: got %q, %v, want %q", again, err, bootID)
	}
	if size := v.Info().Size; size != startSize {
		t.Errorf("size %v, want %v", size, startSize)
	}
	if err := g.enter(ctx, address, nil); err != nil {
		t.Fatal(err)
	}
	t.Run("Refusals", func(t *testing.T) { refusals(t, v, imageSerial, s.image) })
	t.Run("Disk", func(t *testing.T) { disk(t, v, g, address) })
	t.Run("NIC", func(t *testing.T) { nic(t, v, g) })
	t.Run("Freed", func(t *testing.T) { freed(t, v, g) })
	t.Run("Resize", func(t *testing.T) { resize(t, v, g) })
	t.Run("Killed9", func(t *testing.T) {
		pid := v.Info().PID
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		gone(t, s.newDriver(t), c, v, imageSerial, s.image)
		processGone(t, pid)
		ctx := limited(t, callLimit)
		if _, err := g.text(ctx, "/proc/uptime"); err == nil || ctx.Err() != nil {
			t.Errorf("a stream into the VM outlived it: %v", err)
		}
	})
}

// disk plugs in a disk, writes to it on both sides, and takes it away, twice.
func disk(t *testing.T, v vmm.VM, g *guest, image string) {
	ctx := limited(t, callLimit)
	path := filepath.Join(t.TempDir(), "disk")
	const size, at = 8 * mib, 5 * mib
	for i := range 2 {
		serial, ours, theirs := "data", fmt.Appendf(nil, "host %d", i), fmt.Appendf(nil, "guest %d", i)
		if err := os.WriteFile(path, ours, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		address, err := v.AddDisk(ctx, vmm.Disk{Serial: serial, Path: path})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("AddDisk took %v", time.Since(begin))
		id := fmt.Sprint("disk-", i)
		client, err := g.container(ctx, id, image, &agent.BlockDevice{Addr: address})
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		if err := call(ctx, client, "Read", Span{Path: devicePath, Size: len(ours)}, &got); err != nil || !bytes.Equal(got, ours) {
			t.Errorf("the guest reads %q, %v, want %q", got, err, ours)
		}
		if err := call(ctx, client, "Write", Span{Path: devicePath, Offset: at, Data: theirs}, &struct{}{}); err != nil {
			t.Error(err)
		}
		client.Close()
		if err := g.remove(ctx, id); err != nil {
			t.Fatal(err)
		}
		begin = time.Now()
		if err := v.RemoveDisk(ctx, serial); err != nil {
			t.Fatal(err)
		}
		t.Logf("RemoveDisk took %v", time.Since(begin))
		if data, err := os.ReadFile(path); err != nil || len(data) != size || !bytes.HasPrefix(data[at:], theirs) {
			t.Errorf("the guest's bytes %q are not in the file of %d bytes, %v", theirs, len(data), err)
		}
		serials, err := g.files(ctx, "/sys/block/*/serial")
		if err != nil {
			t.Fatal(err)
		}
		for path, have := range serials {
			if have == serial {
				t.Errorf("the guest still has the disk: %s", path)
			}
		}
	}
}

// nic plugs in a network card and has a connection over it.
func nic(t *testing.T, v vmm.VM, g *guest) {
	ctx := limited(t, callLimit)
	w := newWire(t)
	mac := net.HardwareAddr{2, 0xca, 0x15, 0, 0, 1}
	if err := v.AddNIC(ctx, vmm.NIC{MAC: mac, Tap: w.tap, MTU: 1400}); err != nil {
		t.Fatal(err)
	}
	w.tap.Close() // the VM has its own
	if err := g.reached(ctx, w, &agent.Interface{Name: "eth0", Mac: mac.String(), Mtu: 1400}); err != nil {
		t.Fatal(err)
	}
	cards, err := g.files(ctx, "/sys/class/net/*/address")
	if err != nil || cards["/sys/class/net/eth0/address"] != mac.String() {
		t.Errorf("the guest has the cards %v, %v, want eth0 with %v", cards, err, mac)
	}
}

// resize grows and shrinks, and compares what the driver tells with what the guest has.
func resize(t *testing.T, v vmm.VM, g *guest) {
	ctx := limited(t, 2*callLimit)
	base, err := g.memory(ctx) // the kernel keeps some for itself
	if err != nil {
		t.Fatal(err)
	}
	hidden := startSize.Memory - base
	had := startSize
	for _, want := range []vmm.Size{
		maxSize,
		{CPUs: 1, Memory: maxSize.Memory},
		{CPUs: 2, Memory: 512 * mib},
		startSize,
	} {
		begin := time.Now()
		got, err := v.Resize(ctx, want)
		if err != nil {
			t.Fatalf("to %v: %v", want, err)
		}
		t.Logf("to %v: %v within %v", want, got, time.Since(begin))
		if got != v.Info().Size {
			t.Errorf("to %v: returns %v, and Info says %v", want, got, v.Info().Size)
		}
		if got.CPUs < want.CPUs || got.Memory < want.Memory || got.CPUs > max(had.CPUs, want.CPUs) || got.Memory > max(had.Memory, want.Memory) {
			t.Errorf("to %v: got %v, and it had %v before", want, got, had)
		}
		had = got
		eventually(t, "the guest has what the driver says", func() error {
			cpus, err1 := g.cpus(ctx)
			memory, err2 := g.memory(ctx)
			if err := errors.Join(err1, err2); err != nil {
				return err
			}
			if off := got.Memory - hidden - memory; cpus != got.CPUs || off < -tolerance || off > tolerance {
				return fmt.Errorf("the guest has %d CPUs and %d MiB, the driver says %v", cpus, memory/mib, got)
			}
			return nil
		})
	}
	if left := v.Info().Size; left.Memory >= maxSize.Memory {
		t.Errorf("of the memory that was added the guest gave nothing back: %v", left)
	}
}

// tolerance is what the guest's kernel may keep of added memory to describe it, in bytes.
const tolerance = 32 * mib
