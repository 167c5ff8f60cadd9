package guestimage

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestCpioReadsBack lets the cpio program read what tree writes.
func TestCpioReadsBack(t *testing.T) {
	in := make(tree)
	in.file("init", 0o755, []byte("agent"))
	in.file("lib/modules/6.1/a.ko", 0o644, bytes.Repeat([]byte("x"), 4099))
	in.symlink("modprobe", "init")
	in.char("dev/console", 0o600, 5, 1)
	in.dir("tmp", 0o1777)
	var archive bytes.Buffer
	if err := in.write(&archive); err != nil {
		t.Fatal(err)
	}

	out := t.TempDir()
	cmd := exec.Command("cpio", "--extract", "--quiet", "--preserve-modification-time")
	cmd.Dir, cmd.Stdin = out, bytes.NewReader(archive.Bytes())
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, msg)
	}
	data, err := os.ReadFile(filepath.Join(out, "lib/modules/6.1/a.ko"))
	if err != nil || len(data) != 4099 {
		t.Errorf("a.ko has %d bytes, %v", len(data), err)
	}
	if target, err := os.Readlink(filepath.Join(out, "modprobe")); target != "init" {
		t.Errorf("modprobe points to %q, %v", target, err)
	}
	for name, want := range map[string]os.FileMode{
		"init": 0o755, "lib": os.ModeDir | 0o755, "tmp": os.ModeDir | os.ModeSticky | 0o777,
		"dev/console": os.ModeDevice | os.ModeCharDevice | 0o600,
	} {
		info, err := os.Lstat(filepath.Join(out, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if info.Mode() != want {
			t.Errorf("%s: mode %v, want %v", name, info.Mode(), want)
		}
		if !info.ModTime().Equal(time.Unix(0, 0)) && !info.IsDir() {
			t.Errorf("%s: time %v, want 0", name, info.ModTime())
		}
	}
	info, err := os.Stat(filepath.Join(out, "dev/console"))
	if err != nil {
		t.Fatal(err)
	}
	if dev := info.Sys().(*syscall.Stat_t).Rdev; dev != 5<<8|1 {
		t.Errorf("console is device %#x, want 5:1", dev)
	}
}

func TestPackedIsTheSame(t *testing.T) {
	in := make(tree)
	in.file("large", 0o644, bytes.Repeat([]byte("0123456789"), 1<<20))
	var plain, packed bytes.Buffer
	if err := in.write(&plain); err != nil {
		t.Fatal(err)
	}
	if err := in.writePacked(&packed); err != nil {
		t.Fatal(err)
	}
	got, err := decompressLZ4(packed.Bytes()[len(magicLZ4):], int64(plain.Len()))
	if err != nil || !bytes.Equal(got, plain.Bytes()) {
		t.Errorf("%d bytes came out of %d, %v", len(got), plain.Len(), err)
	}
}

func TestCpioIsReproducible(t *testing.T) {
	write := func(names ...string) []byte {
		in := make(tree)
		for _, name := range names {
			in.file(name, 0o644, []byte(name))
		}
		var b bytes.Buffer
		if err := in.write(&b); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	if !bytes.Equal(write("a/b", "c", "d/e/f"), write("d/e/f", "c", "a/b")) {
		t.Error("the order of adding shows in the archive")
	}
}
