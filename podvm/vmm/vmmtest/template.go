package vmmtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// clones is how many there are at once.
const clones = 6

// template boots a VM, makes a template of it, and then clones.
func (s *suite) template(t *testing.T) {
	d, dir := s.newDriver(t), filepath.Join(t.TempDir(), "template")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	memory := filepath.Join(dir, "memory")
	if err := os.WriteFile(s.ownDisk(dir).Path, diskText, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(s.ownDisk(dir).Path, diskSize); err != nil {
		t.Fatal(err)
	}
	var cold time.Duration
	launched := time.Now()
	t.Run("Snapshot", func(t *testing.T) { cold = s.snapshot(t, d, dir, memory) })
	age := time.Since(launched)
	if t.Failed() {
		return
	}
	before := digest(t, memory)
	t.Run("Speed", func(t *testing.T) { s.speed(t, d, dir, cold) })
	t.Run("Clones", func(t *testing.T) { s.clones(t, d, dir, age) })
	t.Run("Attach", func(t *testing.T) { s.attachClone(t, dir) })
	if digest(t, memory) != before {
		t.Error("clones wrote to their template's memory")
	}
	t.Run("Damaged", func(t *testing.T) { s.damaged(t, d, dir, memory) })
}

// The disk that template and clones have from the beginning.
var diskText = []byte("the template's")

const diskSize = 8 * mib

// ownDisk is that disk with its file in dir.
func (s *suite) ownDisk(dir string) *vmm.Disk {
	return &vmm.Disk{Serial: "own", Path: filepath.Join(dir, "disk")}
}

// snapshot makes a template in dir, and returns how long its guest took to answer.
func (s *suite) snapshot(t *testing.T, d vmm.Driver, dir, memory string) time.Duration {
	c := s.config(t, "template")
	c.MemoryFile, c.Disk, c.Tap = memory, s.ownDisk(dir), newWire(t).tap
	ctx := limited(t, bootLimit)
	v, cold := answers(t, d, c)
	snapshotter, ok := v.(vmm.Snapshotter)
	if !ok {
		t.Fatal("it has no snapshots")
	}
	if err := snapshotter.Snapshot(ctx, t.TempDir()); err == nil {
		t.Error("a snapshot was made where the memory is not")
	}
	begin := time.Now()
	if err := snapshotter.Snapshot(ctx, dir); err != nil {
		t.Fatal(err)
	}
	t.Logf("the snapshot took %v", time.Since(begin))
	pid := v.Info().PID
	if err := v.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	gone(t, d, c, v, imageSerial, s.image, "killed")
	processGone(t, pid)
	return cold
}

// answers launches a VM and measures how long its guest takes to answer and to hang up.
func answers(t *testing.T, d vmm.Driver, c vmm.Config) (vmm.VM, time.Duration) {
	t.Helper()
	begin, ctx := time.Now(), limited(t, bootLimit)
	v := launch(t, d, c)
	conn, err := v.Dial(ctx, vmm.AgentPort)
	if err != nil {
		t.Fatal(err)
	}
	hangUp(t, ctx, conn)
	return v, time.Since(begin)
}

// speed compares clones, one at a time, with a cold boot. The machine may be busy with other things,
// so that only a clone that gains nothing fails.
func (s *suite) speed(t *testing.T, d vmm.Driver, dir string, cold time.Duration) {
	best := cold
	for i := range 3 {
		c, _ := s.cloneConfig(t, fmt.Sprint("quick-", i), dir)
		v, took := answers(t, d, c)
		if err := v.Kill(limited(t, callLimit)); err != nil {
			t.Fatal(err)
		}
		best = min(best, took)
		t.Logf("a cold boot answered after %v, this clone after %v, 1/%.1f of it", cold, took, float64(cold)/float64(took))
	}
	if best > cold/2 {
		t.Errorf("the quickest clone answered after %v, a cold boot after %v", best, cold)
	}
}

// hangUp closes a connection and waits until the guest has.
func hangUp(t *testing.T, ctx context.Context, conn io.ReadCloser) {
	t.Helper()
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	half, ok := conn.(interface{ CloseWrite() error })
	if !ok {
		t.Fatalf("a stream to the guest, %T, can't be half-closed", conn)
	}
	if err := half.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); err != nil {
		t.Fatalf("the guest does not hang up: %v", err)
	}
}

// clone is one of several.
type clone struct {
	config vmm.Config
	wire   *wire
	vm     vmm.VM
	guest  *guest
	random map[string]string
	mark   []byte
	// uptime is what its guest said, and took how long it had run then.
	uptime, took time.Duration
}

// clones runs several at once, which must not have anything in common that is secret. age is how old the guest
// was, at most, of which the snapshot was made: their clocks go on from there.
func (s *suite) clones(t *testing.T, d vmm.Driver, dir string, age time.Duration) {
	all := make([]*clone, clones)
	var group sync.WaitGroup
	for i := range all {
		all[i] = &clone{mark: bytes.Repeat([]byte{byte('A' + i)}, mib)}
		all[i].config, all[i].wire = s.cloneConfig(t, fmt.Sprint("clone-", i), dir)
		group.Go(func() {
			if err := all[i].run(t, d, s.image); err != nil {
				t.Errorf("clone %d: %v", i, err)
			}
		})
	}
	group.Wait()
	if t.Failed() {
		return
	}
	seen := map[string]string{}
	for _, c := range all {
		if oldest := age + c.took; c.uptime > oldest {
			t.Errorf("%s says that it has been up for %v, but can't have been for longer than %v: its clock jumped", c.config.ID, c.uptime, oldest)
		}
		for source, value := range c.random {
			if other := seen[value]; value == "" || other != "" {
				t.Errorf("%s of %s is %q, the same as %s", source, c.config.ID, value, other)
			}
			seen[value] = source + " of " + c.config.ID
		}
		var got []byte
		if err := call(limited(t, callLimit), c.guest.Client, "Read", Span{Path: markPath, Size: 2 * mib}, &got); err != nil || !bytes.Equal(got, c.mark) {
			t.Errorf("%s has lost what it wrote: %d bytes, %v", c.config.ID, len(got), err)
		}
		if disk, err := os.ReadFile(c.config.Disk.Path); err != nil || !bytes.HasPrefix(disk, diskText) || !bytes.HasPrefix(disk[mib:], c.mark) {
			t.Errorf("%s has lost what it wrote to its disk, %v", c.config.ID, err)
		}
	}
	t.Run("Panic", func(t *testing.T) { panics(t, d, all[0], s.image) })
	t.Run("Kill", func(t *testing.T) {
		c, pid := all[1], all[1].vm.Info().PID
		if err := c.vm.Kill(limited(t, callLimit)); err != nil {
			t.Fatal(err)
		}
		gone(t, d, c.config, c.vm, imageSerial, s.image, "killed")
		processGone(t, pid)
	})
}

// cloneConfig is that of a clone of the template in dir, with its own disk, and its card on a wire.
func (s *suite) cloneConfig(t *testing.T, id, dir string) (vmm.Config, *wire) {
	t.Helper()
	c, w := s.config(t, id), newWire(t)
	c.Template, c.Disk, c.Tap = dir, s.ownDisk(t.TempDir()), w.tap
	copyFile(t, s.ownDisk(dir).Path, c.Disk.Path, diskSize)
	return c, w
}

const markPath = "/dev/shm/mark"

// run starts the clone, reads the random sources of its guest, and writes to its memory. Its VM ends
// with the test.
func (c *clone) run(t *testing.T, d vmm.Driver, image string) (err error) {
	begin, ctx := time.Now(), limited(t, bootLimit)
	c.vm, err = d.Launch(ctx, c.config)
	c.wire.tap.Close() // the VM has its own
	if err != nil {
		return err
	}
	t.Cleanup(func() {
		if err := c.vm.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	c.guest = inside(t, c.vm)
	bootID, err := c.guest.setup(ctx, c.config.ID)
	if err != nil {
		return err
	}
	address, err := addImage(ctx, c.vm, image)
	if err != nil {
		return err
	}
	if err := c.guest.enter(ctx, address, &agent.BlockDevice{Addr: vmm.SerialAddress(c.config.Disk.Serial)}); err != nil {
		return err
	}
	if err := c.guest.reached(ctx, c.wire, &agent.Interface{Name: "eth0", CardMac: vmm.CardMAC, Mac: "02:00:00:00:00:09"}); err != nil {
		return err
	}
	var disk []byte
	if err := call(ctx, c.guest.Client, "Read", Span{Path: devicePath, Size: len(diskText)}, &disk); err != nil || !bytes.Equal(disk, diskText) {
		return fmt.Errorf("its disk has %q: %w", disk, errors.Join(err, errdefs.ErrDataLoss))
	}
	if err := call(ctx, c.guest.Client, "Write", Span{Path: devicePath, Offset: mib, Data: c.mark}, &struct{}{}); err != nil {
		return err
	}
	const proc = "/proc/sys/kernel/random/"
	c.random = map[string]string{}
	for _, path := range []string{proc + "uuid", proc + "boot_id"} {
		if c.random[path], err = c.guest.text(ctx, path); err != nil {
			return err
		}
	}
	if c.random[proc+"boot_id"] != bootID {
		return fmt.Errorf("its containers see the boot id %q, the agent says %q", c.random[proc+"boot_id"], bootID)
	}
	for _, path := range []string{"/dev/urandom", "/dev/random"} {
		var data []byte
		if err := call(ctx, c.guest.Client, "Read", Span{Path: path, Size: 16}, &data); err != nil {
			return err
		}
		c.random[path] = fmt.Sprintf("%x", data)
	}
	text, err := c.guest.text(ctx, "/proc/uptime")
	if err != nil {
		return err
	}
	c.took = time.Since(begin)
	seconds, _, _ := strings.Cut(text, " ")
	if c.uptime, err = time.ParseDuration(seconds + "s"); err != nil {
		return err
	}
	return call(ctx, c.guest.Client, "Write", Span{Path: markPath, Data: c.mark}, &struct{}{})
}

// panics has a guest's kernel panic.
func panics(t *testing.T, d vmm.Driver, c *clone, image string) {
	pid := c.vm.Info().PID
	go call(t.Context(), c.guest.Client, "Write", Span{Path: "/proc/sysrq-trigger", Data: []byte("c")}, &struct{}{})
	gone(t, d, c.config, c.vm, imageSerial, image, "panicked: sysrq triggered crash")
	processGone(t, pid)
}

// attachClone finds a clone whose owner died.
func (s *suite) attachClone(t *testing.T, dir string) {
	c, _ := s.cloneConfig(t, "orphan-clone", dir)
	d := s.newDriver(t)
	sweep(t, d, c)
	bootID, _ := orphan(t, c, s.image)
	// Meanwhile the template may have made room for another one.
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	defer os.Rename(dir+".away", dir)
	ctx := limited(t, callLimit)
	v, err := d.Attach(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := inside(t, v).setup(ctx, c.ID); err != nil || again != bootID {
		t.Fatalf("set up what was set up: got %q, %v, want %q", again, err, bootID)
	}
	refusals(t, v, c.Disk.Serial, c.Disk.Path)
	if err := v.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	gone(t, d, c, v, imageSerial, s.image, "killed")
}

// damaged has templates that can't be cloned.
func (s *suite) damaged(t *testing.T, d vmm.Driver, dir, memory string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() == 0 {
			continue // there is nothing to lose
		}
		if path == s.ownDisk(dir).Path {
			continue // each clone brings its own
		}
		t.Run("cut short "+e.Name(), func(t *testing.T) {
			defer keep(t, path)()
			copyFile(t, path+whole, path, info.Size()/2)
			s.refusesClone(t, d, dir)
		})
		if path == memory || info.Sys().(*syscall.Stat_t).Blocks == 0 {
			continue // no VMM can know what should be in it, or nothing is
		}
		t.Run("of another version "+e.Name(), func(t *testing.T) {
			defer keep(t, path)()
			garble(t, path+whole, path)
			s.refusesClone(t, d, dir)
		})
	}
	t.Run("no card", func(t *testing.T) {
		c := s.config(t, "no-card")
		c.Template, c.Disk = dir, s.ownDisk(dir)
		refused(t, d, c)
	})
	t.Run("no memory", func(t *testing.T) {
		if err := os.Remove(memory); err != nil {
			t.Fatal(err)
		}
		s.refusesClone(t, d, dir)
	})
}

// whole is added to the name of a file while something else is in its place.
const whole = ".whole"

// keep puts a file aside, until the function that it returns is called.
func keep(t *testing.T, path string) func() {
	t.Helper()
	if err := os.Rename(path, path+whole); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Rename(path+whole, path); err != nil {
			t.Error(err)
		}
	}
}

// garble writes a file of the same size that says nothing to who reads it, from its first byte on.
func garble(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	for i := range data {
		data[i] ^= 0x55
	}
	if err := os.WriteFile(to, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// copyFile copies the first size bytes.
func copyFile(t *testing.T, from, to string, size int64) {
	t.Helper()
	source, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	target, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	if _, err := io.CopyN(target, source, size); err != nil {
		t.Fatal(err)
	}
}

func (s *suite) refusesClone(t *testing.T, d vmm.Driver, dir string) {
	t.Helper()
	c := s.config(t, "damaged")
	c.Template, c.Disk, c.Tap = dir, s.ownDisk(dir), newWire(t).tap
	refused(t, d, c)
}

func digest(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}
