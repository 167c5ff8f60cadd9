package cloudhv

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/caisson-vm/caisson/podvm/vmm/machine"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// mapTemplate makes a template's memory file of some pages, of which this process, in a VMM's stead, has a
// private mapping.
func mapTemplate(t *testing.T, pages int) (dir string, content, mapped []byte) {
	t.Helper()
	dir, content = t.TempDir(), make([]byte, pages*pageSize)
	rand.Read(content)
	if err := os.WriteFile(filepath.Join(dir, "memory"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, content, mapMemory(t, dir)
}

// mapMemory maps a template's memory as a clone's VMM does.
func mapMemory(t *testing.T, dir string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	mapped, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mapped) })
	return mapped
}

func owned(t *testing.T, dir string) []run {
	t.Helper()
	m, err := openMemory(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.find(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	runs, err := m.own()
	if err != nil {
		t.Fatal(err)
	}
	return runs
}

// TestLearn: what two clones have written, and no more, the next one has copies of, with the template's
// content; what it has written itself stays.
func TestLearn(t *testing.T) {
	dir, content, first := mapTemplate(t, 64)
	var sum byte
	for page := range 32 { // reading makes no copy
		sum += first[page*pageSize]
	}
	d := &Driver{}
	clone := first
	for _, wrote := range [][]int{{3, 4, 20, 33, 63}, {3, 4, 5, 20, 63}} {
		if d.Learned(dir) {
			t.Error("the template knows before it was taught")
		}
		for _, page := range wrote {
			clone[page*pageSize+7] ^= sum | 1
		}
		if err := learn(os.Getpid(), dir); err != nil {
			t.Fatal(err)
		}
		unix.Munmap(clone)
		clone = mapMemory(t, dir)
		if err := copyWritten(os.Getpid(), dir); err != nil || !d.Learned(dir) && owned(t, dir) != nil {
			t.Errorf("a clone between the lessons: error %v, it has %v for its own", err, owned(t, dir))
		}
	}
	if !d.Learned(dir) {
		t.Error("the template does not know")
	}
	unix.Munmap(clone)
	last := mapMemory(t, dir)
	last[4*pageSize] ^= 1
	if err := copyWritten(os.Getpid(), dir); err != nil {
		t.Fatal(err)
	}
	if got, want := owned(t, dir), []run{{3, 2}, {20, 1}, {63, 1}}; !slices.Equal(got, want) {
		t.Errorf("the clone has %v for its own, want %v", got, want)
	}
	content[4*pageSize] ^= 1
	if !bytes.Equal(last, content) {
		t.Error("its memory is not the template's and what it has written")
	}
}

// TestLearnTooMuch: a clone that has written a lot, or nothing, teaches nothing.
func TestLearnTooMuch(t *testing.T) {
	dir, content, mapped := mapTemplate(t, writtenMax+1)
	d := &Driver{}
	if err := learn(os.Getpid(), dir); !errdefs.IsOutOfRange(err) {
		t.Errorf("nothing: got %v", err)
	}
	for page := range len(content) / pageSize {
		mapped[page*pageSize]++
	}
	if err := learn(os.Getpid(), dir); !errdefs.IsOutOfRange(err) || d.Learned(dir) {
		t.Errorf("too much: got %v", err)
	}
	if err := d.Learn(&vm{VM: &machine.VM{}}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("no clone: got %v", err)
	}
}

// TestWrittenDamaged: nothing is written to a clone of a template whose list is not one.
func TestWrittenDamaged(t *testing.T) {
	dir, content, mapped := mapTemplate(t, 8)
	m, err := openMemory(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	memory, err := json.Marshal(m.identity)
	if err != nil {
		t.Fatal(err)
	}
	d := &Driver{}
	for name, list := range map[string]string{
		"before": "[[-1,1]]", "after": "[[8,1]]", "beyond": "[[7,2]]", "none": "[[2,0]]", "negative": "[[2,-1]]",
		"overflow": "[[9223372036854775807,2]]", "huge": "[[0,9223372036854775807]]", "no JSON": "[",
	} {
		if err := os.WriteFile(writtenPath(dir), []byte(`{"memory":`+string(memory)+`,"lessons":2,"runs":`+list+`}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := copyWritten(os.Getpid(), dir); err == nil || d.Learned(dir) {
			t.Errorf("%s was taken: %v", name, err)
		}
	}
	if err := os.WriteFile(writtenPath(dir), []byte(`{"memory":{"inode":1,"modified":2},"lessons":2,"runs":[[2,1]]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := copyWritten(os.Getpid(), dir); err != nil || d.Learned(dir) {
		t.Errorf("the list of a template of the same name was taken: %v", err)
	}
	if own := owned(t, dir); own != nil || !bytes.Equal(mapped, content) {
		t.Errorf("the clone has %v for its own", own)
	}
	os.Remove(writtenPath(dir))
	if err := copyWritten(os.Getpid(), dir); err != nil {
		t.Errorf("a template that was not taught: %v", err)
	}
	unix.Munmap(mapped)
	if err := m.find(os.Getpid()); err == nil {
		t.Error("a process that has not mapped the memory was taken for a VMM")
	}
}

func TestParseMapping(t *testing.T) {
	for line, want := range map[string]mapping{
		"7f5d00000000-7f5d20000000 rw-p 00000000 fe:01 77                         /var/lib/x y/memory": {0x7f5d00000000, 0x7f5d20000000, 0},
		"7f5d20000000-7f5d20200000 rw-p 20000000 fe:01 77 /memory (deleted)":                           {0x7f5d20000000, 0x7f5d20200000, 0x20000000},
		"7f5d00000000-7f5d20000000 rw-s 00000000 fe:01 77 /memory":                                     {},
		"7f5d00000000-7f5d20000000 r--p 00000000 fe:01 77 /memory":                                     {},
		"7f5d00000000-7f5d20000000 r--p":                                                               {},
		"":                                                                                             {},
	} {
		got, inode := parseMapping(line)
		if (inode == 77) != (want != mapping{}) || got != want {
			t.Errorf("%q: %+v, inode %d", line, got, inode)
		}
	}
}

// TestRunOverMappings: pages that follow one another in the file need not in the VMM.
func TestRunOverMappings(t *testing.T) {
	m := &memory{maps: []mapping{{pageSize, 3 * pageSize, 4 * pageSize}, {9 * pageSize, 10 * pageSize, 6 * pageSize}}}
	for _, c := range []struct {
		r              run
		address, pages int64
	}{{run{4, 1}, pageSize, 1}, {run{5, 2}, 2 * pageSize, 1}, {run{6, 1}, 9 * pageSize, 1}, {run{7, 1}, 0, 0}, {run{3, 1}, 0, 0}} {
		if address, pages := m.address(c.r); address != c.address || pages != c.pages {
			t.Errorf("%v is at %d, %d pages; want %d, %d", c.r, address, pages, c.address, c.pages)
		}
	}
}
