package cloudhv

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/atomicfile"
	"github.com/caisson-vm/caisson/podvm/vmm"
)

// A clone's memory is its template's until it writes to it, page by page. A page that the guest reads
// first and writes then takes three exits: to map the template's page, to copy it, and to map the copy.
// Where a template knows what its clones write, they have copies before they run, and each page takes one.

// run is a row of guest pages: the first one's number, and how many they are.
type run [2]int64

// writtenMax bounds what clones get copies of, in pages: 16 MiB.
const writtenMax = 4096

const pageSize = 4096

func writtenPath(template string) string { return filepath.Join(template, "written.json") }

// Learn implements vmm.Learner.
func (d *Driver) Learn(v vmm.VM) error {
	c, ok := v.(*vm)
	if !ok || c.Config.Template == "" {
		return fmt.Errorf("learn what clones write: not a clone: %w", errdefs.ErrFailedPrecondition)
	}
	if err := learn(c.Info().PID, c.Config.Template); err != nil {
		return fmt.Errorf("learn what clones write: %w", err)
	}
	return nil
}

// learn notes what the clone whose VMM this process is has written to.
func learn(pid int, template string) error {
	m, err := openMemory(pid, template)
	if err != nil {
		return err
	}
	defer m.Close()
	runs, err := m.own()
	if err != nil {
		return err
	}
	if n := count(runs); n == 0 || n > writtenMax {
		return fmt.Errorf("this one has %d pages of its own, want 1 to %d: %w", n, writtenMax, errdefs.ErrOutOfRange)
	}
	data, err := json.Marshal(runs)
	if err != nil {
		return err
	}
	if err := atomicfile.Write(writtenPath(template), data, 0o600); err != nil {
		return err
	}
	slog.Info("the template knows which pages its clones write", "template", filepath.Base(template), "pages", count(runs))
	return nil
}

// Learned implements vmm.Learner.
func (d *Driver) Learned(template string) bool {
	_, err := os.Stat(writtenPath(template))
	return err == nil
}

// resume lets a clone that was restored run, once it has copies of what it is known to write. Without them
// it is slower.
func (v *vm) resume(ctx context.Context) error {
	if err := copyWritten(v.Info().PID, v.Config.Template); err != nil {
		slog.Warn("a clone begins without copies of the pages that it will write: it starts more slowly", "pod", v.Config.ID, "err", err)
	}
	return v.api.put(ctx, "vm.resume", nil, nil)
}

// copyWritten gives a clone, which does not run yet, its own copies of what its template knows.
func copyWritten(pid int, template string) error {
	data, err := os.ReadFile(writtenPath(template))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	var runs []run
	if err := json.Unmarshal(data, &runs); err != nil {
		return fmt.Errorf("%s: %w", writtenPath(template), err)
	}
	m, err := openMemory(pid, template)
	if err != nil {
		return err
	}
	defer m.Close()
	if err := m.check(runs); err != nil {
		return err
	}
	own, err := m.own() // what its devices have written already is not the template's any more
	if err != nil {
		return err
	}
	return m.copy(without(runs, own))
}

// memory is a clone's memory as its VMM has it mapped.
type memory struct {
	pid  int
	file *os.File // the template's
	size int64
	maps []mapping
}

// mapping is a part of the template's file in the VMM's address space.
type mapping struct{ begin, end, offset int64 }

// openMemory finds where the VMM of a clone has its template's memory.
func openMemory(pid int, template string) (*memory, error) {
	f, err := os.Open(filepath.Join(template, "memory"))
	if err != nil {
		return nil, err
	}
	m := &memory{pid: pid, file: f}
	if err := m.find(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return m, nil
}

func (m *memory) Close() error { return m.file.Close() }

func (m *memory) find() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(m.file.Fd()), &st); err != nil {
		return err
	}
	m.size = st.Size
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", m.pid))
	if err != nil {
		return err
	}
	defer maps.Close()
	file := fmt.Sprintf("%02x:%02x %d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		if a, ok := parseMapping(lines.Text(), file); ok {
			m.maps = append(m.maps, a)
		}
	}
	if len(m.maps) == 0 {
		return fmt.Errorf("process %d has not mapped %s copy-on-write", m.pid, m.file.Name())
	}
	return nil
}

// parseMapping reads a line of /proc/PID/maps, if it is a private mapping of the file to be written to:
// "begin-end rw-p offset major:minor inode path".
// Source: proc_pid_maps(5).
func parseMapping(line, file string) (a mapping, ok bool) {
	var mode, device string
	var inode int64
	n, _ := fmt.Sscanf(line, "%x-%x %s %x %s %d", &a.begin, &a.end, &mode, &a.offset, &device, &inode)
	return a, n == 6 && strings.HasPrefix(mode, "rw") && strings.HasSuffix(mode, "p") && fmt.Sprint(device, " ", inode) == file
}

// own lists the pages that are the clone's own. It may run meanwhile.
// Source: Documentation/admin-guide/mm/pagemap.rst of Linux.
func (m *memory) own() (runs []run, err error) {
	const present, ofFile = 1 << 63, 1 << 61
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", m.pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for _, a := range m.maps {
		entries := make([]byte, (a.end-a.begin)/pageSize*8)
		if _, err := f.ReadAt(entries, a.begin/pageSize*8); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		for n := range int64(len(entries) / 8) {
			if e := binary.NativeEndian.Uint64(entries[n*8:]); e&present != 0 && e&ofFile == 0 {
				runs = add(runs, a.offset/pageSize+n)
			}
		}
	}
	return runs, nil
}

// add adds a page to the last run, or begins another.
func add(runs []run, page int64) []run {
	if n := len(runs); n > 0 && runs[n-1][0]+runs[n-1][1] == page {
		runs[n-1][1]++
		return runs
	}
	return append(runs, run{page, 1})
}

// without returns the pages of runs that are not in others.
func without(runs, others []run) (left []run) {
	except := map[int64]bool{}
	for _, r := range others {
		for page := r[0]; page < r[0]+r[1]; page++ {
			except[page] = true
		}
	}
	for _, r := range runs {
		for page := r[0]; page < r[0]+r[1]; page++ {
			if !except[page] {
				left = add(left, page)
			}
		}
	}
	return left
}

func count(runs []run) (n int64) {
	for _, r := range runs {
		n += r[1]
	}
	return n
}

// batch is how many runs are written by one call; the kernel takes at most 1024.
const batch = 256

// copy gives the clone, which does not run, its own copies of pages: it writes to them what is there.
func (m *memory) copy(runs []run) error {
	data, err := unix.Mmap(int(m.file.Fd()), 0, int(m.size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %s: %w", m.file.Name(), err)
	}
	defer unix.Munmap(data)
	var from []unix.Iovec
	var to []unix.RemoteIovec
	for i, r := range runs {
		address, ok := m.address(r)
		if !ok {
			return fmt.Errorf("process %d has not mapped the pages %d to %d of %s: %w", m.pid, r[0], r[0]+r[1]-1, m.file.Name(), errdefs.ErrOutOfRange)
		}
		size := int(r[1] * pageSize)
		v := unix.Iovec{Base: &data[r[0]*pageSize]}
		v.SetLen(size)
		from, to = append(from, v), append(to, unix.RemoteIovec{Base: uintptr(address), Len: size})
		if len(to) == batch || i == len(runs)-1 {
			if err := m.write(from, to); err != nil {
				return err
			}
			from, to = from[:0], to[:0]
		}
	}
	return nil
}

func (m *memory) write(from []unix.Iovec, to []unix.RemoteIovec) error {
	want := 0
	for _, v := range to {
		want += v.Len
	}
	n, err := unix.ProcessVMWritev(m.pid, from, to, 0)
	if err != nil {
		return fmt.Errorf("write to the memory of process %d: %w", m.pid, err)
	}
	if n != want {
		return fmt.Errorf("write to the memory of process %d: %d of %d bytes: %w", m.pid, n, want, io.ErrShortWrite)
	}
	return nil
}

// check refuses what is not within the file, or too much.
func (m *memory) check(runs []run) error {
	for _, r := range runs {
		if r[0] < 0 || r[1] <= 0 || r[1] > writtenMax || r[0] > m.size/pageSize-r[1] {
			return fmt.Errorf("pages %d, %d of %s: %w", r[0], r[1], m.file.Name(), errdefs.ErrOutOfRange)
		}
	}
	if n := count(runs); n > writtenMax {
		return fmt.Errorf("%d pages of %s, at most %d: %w", n, m.file.Name(), writtenMax, errdefs.ErrOutOfRange)
	}
	return nil
}

// address is where a run is in the VMM, if all of it is in one mapping.
func (m *memory) address(r run) (int64, bool) {
	for _, a := range m.maps {
		if at := a.begin + r[0]*pageSize - a.offset; at >= a.begin && at+r[1]*pageSize <= a.end {
			return at, true
		}
	}
	return 0, false
}
