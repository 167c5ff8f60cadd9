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

// lessons is how many clones teach a template: it knows what each of them has written. What only one has may be
// chance, of which clones would have copies for nothing.
const lessons = 2

// run is a row of guest pages: the first one's number, and how many they are.
type run [2]int64

// writtenMax bounds what clones get copies of, in pages: 16 MiB.
const writtenMax = 4096

const pageSize = 4096

func writtenPath(template string) string { return filepath.Join(template, "written.json") }

// written is what a template knows of its clones. Memory says of which file, because a template that is made
// anew has the same name.
type written struct {
	Memory  fileIdentity `json:"memory"`
	Lessons int          `json:"lessons"`
	Runs    []run        `json:"runs"`
}

// fileIdentity is a file's number and when it was last written to, in ns.
type fileIdentity struct {
	Inode    uint64 `json:"inode"`
	Modified int64  `json:"modified"`
}

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
	m, err := openMemory(template)
	if err != nil {
		return err
	}
	defer m.Close()
	if err := m.find(pid); err != nil {
		return err
	}
	own, err := m.own()
	if err != nil {
		return err
	}
	w, err := m.read(template)
	if err != nil {
		slog.Warn("what the template knows of its clones is of no use: it begins anew", "err", err)
	}
	runs := own
	if w.Lessons > 0 && w.Lessons < lessons {
		runs = without(own, without(own, w.Runs))
	} else {
		w.Lessons = 0
	}
	if n := count(runs); n == 0 || n > writtenMax {
		return fmt.Errorf("this one has %d pages of its own, %d with those before it, want 1 to %d: %w", count(own), n, writtenMax, errdefs.ErrOutOfRange)
	}
	data, err := json.Marshal(written{m.identity, w.Lessons + 1, runs})
	if err != nil {
		return err
	}
	if err := atomicfile.Write(writtenPath(template), data, 0o600); err != nil {
		return err
	}
	slog.Info("the template learns which pages its clones write", "template", filepath.Base(template), "lesson", w.Lessons+1, "of", lessons, "pages", count(own), "known", count(runs))
	return nil
}

// Learned implements vmm.Learner. A list that is damaged, or another template's, is none.
func (d *Driver) Learned(template string) bool {
	m, err := openMemory(template)
	if err != nil {
		return false
	}
	defer m.Close()
	runs, err := m.known(template)
	return err == nil && runs != nil
}

// resume lets a clone that was restored run, once it has copies of what it is known to write. Without them
// it is slower.
func (v *vm) resume(ctx context.Context) error {
	if err := copyWritten(v.Info().PID, v.Config.Template); err != nil {
		v.driver.slow.Do(func() {
			slog.Warn("clones begin without copies of the pages that they will write, and start more slowly; this is said once", "pod", v.Config.ID, "err", err)
		})
	}
	return v.api.put(ctx, "vm.resume", nil, nil)
}

// copyWritten gives a clone, which does not run yet, its own copies of what its template knows.
func copyWritten(pid int, template string) error {
	m, err := openMemory(template)
	if err != nil {
		return err
	}
	defer m.Close()
	runs, err := m.known(template)
	if err != nil || runs == nil {
		return err
	}
	if err := m.find(pid); err != nil {
		return err
	}
	own, err := m.own() // what its devices have written already is not the template's any more
	if err != nil {
		return err
	}
	return m.copy(without(runs, own))
}

// memory is a template's memory, and where the VMM of a clone has it mapped.
type memory struct {
	file     *os.File
	size     int64
	identity fileIdentity
	pid      int
	maps     []mapping
}

// mapping is a part of the template's file in the VMM's address space.
type mapping struct{ begin, end, offset int64 }

func openMemory(template string) (*memory, error) {
	f, err := os.Open(filepath.Join(template, "memory"))
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", f.Name(), err), f.Close())
	}
	return &memory{file: f, size: st.Size, identity: fileIdentity{st.Ino, st.Mtim.Nano()}}, nil
}

func (m *memory) Close() error { return m.file.Close() }

// known is what the template knows; nil where it was not taught, or has lessons to come.
func (m *memory) known(template string) ([]run, error) {
	w, err := m.read(template)
	if err != nil || w.Lessons < lessons {
		return nil, err
	}
	return w.Runs, nil
}

// read reads what the template was taught; nothing where it was not.
func (m *memory) read(template string) (w written, err error) {
	data, err := os.ReadFile(writtenPath(template))
	if errors.Is(err, fs.ErrNotExist) {
		return written{}, nil
	} else if err != nil {
		return written{}, err
	}
	if err := json.Unmarshal(data, &w); err != nil {
		return written{}, fmt.Errorf("%s: %w", writtenPath(template), err)
	}
	if w.Memory != m.identity {
		return written{}, nil
	}
	if err := m.check(w.Runs); err != nil {
		return written{}, err
	}
	return w, nil
}

// find finds where the VMM has mapped the memory.
func (m *memory) find(pid int) error {
	m.pid = pid
	file, err := m.file.Stat()
	if err != nil {
		return err
	}
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return err
	}
	defer maps.Close()
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		a, inode := parseMapping(lines.Text())
		if inode != m.identity.Inode {
			continue
		}
		// Some file systems give stat(2) another device than this list.
		mapped, err := os.Stat(fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, a.begin, a.end))
		if err == nil && os.SameFile(mapped, file) {
			m.maps = append(m.maps, a)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s: %w", maps.Name(), err)
	}
	if len(m.maps) == 0 {
		return fmt.Errorf("process %d has not mapped %s copy-on-write", pid, m.file.Name())
	}
	return nil
}

// parseMapping reads a line of /proc/PID/maps, if it is a private mapping of a file to be written to:
// "begin-end rw-p offset major:minor inode path". Else the inode is 0.
// Source: proc_pid_maps(5).
func parseMapping(line string) (a mapping, inode uint64) {
	var mode, device string
	n, _ := fmt.Sscanf(line, "%x-%x %s %x %s %d", &a.begin, &a.end, &mode, &a.offset, &device, &inode)
	if n != 6 || !strings.HasPrefix(mode, "rw") || !strings.HasSuffix(mode, "p") {
		return mapping{}, 0
	}
	return a, inode
}

// own lists the pages that are the clone's own. It may run meanwhile.
// Source: Documentation/admin-guide/mm/pagemap.rst of Linux.
func (m *memory) own() (runs []run, err error) {
	const present, swapped, ofFile = 1 << 63, 1 << 62, 1 << 61
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", m.pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for _, a := range m.maps {
		entries := make([]byte, (a.end-a.begin)/pageSize*8)
		if _, err := f.ReadAt(entries, a.begin/pageSize*8); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		for n := range int64(len(entries) / 8) {
			if e := binary.NativeEndian.Uint64(entries[n*8:]); e&(present|swapped) != 0 && e&ofFile == 0 {
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
		for r[1] > 0 {
			address, pages := m.address(r)
			if pages == 0 {
				return fmt.Errorf("process %d has not mapped page %d of %s: %w", m.pid, r[0], m.file.Name(), errdefs.ErrOutOfRange)
			}
			size := int(pages * pageSize)
			v := unix.Iovec{Base: &data[r[0]*pageSize]}
			v.SetLen(size)
			from, to = append(from, v), append(to, unix.RemoteIovec{Base: uintptr(address), Len: size})
			r[0], r[1] = r[0]+pages, r[1]-pages
		}
		if len(to) >= batch || i == len(runs)-1 {
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

// address is where a run begins in the VMM, and how many of its pages are there in one piece.
func (m *memory) address(r run) (address, pages int64) {
	for _, a := range m.maps {
		if at := a.begin + r[0]*pageSize - a.offset; at >= a.begin && at < a.end {
			return at, min(r[1], (a.end-at)/pageSize)
		}
	}
	return 0, 0
}
