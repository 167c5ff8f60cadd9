package template

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
)

// driver launches VMs that are nothing but files.
type driver struct {
	launched atomic.Int32
	fail     error
	boots    chan *machine // where set, guests never come up, and their VMs are sent here
}

func (d *driver) Name() string { return "files" }

func (d *driver) Launch(_ context.Context, c vmm.Config) (vmm.VM, error) {
	d.launched.Add(1)
	if d.fail != nil {
		return nil, d.fail
	}
	if err := os.WriteFile(c.MemoryFile, []byte("memory"), 0o600); err != nil {
		return nil, err
	}
	m := &machine{hangs: d.boots != nil}
	if m.hangs {
		d.boots <- m
	}
	return m, os.Truncate(c.MemoryFile, 1<<20)
}

func (d *driver) Attach(context.Context, vmm.Config) (vmm.VM, error) { return nil, errNoAnswer }

// errNoAnswer is what a VMM that hangs gives who wants to attach.
var errNoAnswer = errors.New("no answer")

type machine struct {
	vmm.VM
	hangs  bool
	killed atomic.Bool
}

func (m *machine) Dial(ctx context.Context, _ uint32) (net.Conn, error) {
	if m.hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	host, _ := net.Pipe()
	return host, nil
}

func (m *machine) Snapshot(_ context.Context, dir string) error {
	return os.WriteFile(filepath.Join(dir, "state.json"), []byte("state"), 0o600)
}

func (m *machine) Kill(context.Context) error { m.killed.Store(true); return nil }

func options(t *testing.T, d vmm.Driver) Options {
	t.Helper()
	root := t.TempDir()
	return Options{Dir: filepath.Join(root, "templates"), Run: root, Driver: d, Depends: []string{"guest 1"}}
}

func store(t *testing.T, o Options) *Store {
	t.Helper()
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func get(t *testing.T, s *Store, scope string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	dir, err := s.Template(ctx, scope)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestMadeOnceForAll(t *testing.T) {
	d := &driver{}
	o := options(t, d)
	s := store(t, o)
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() { get(t, s, "") })
	}
	group.Wait()
	dir := get(t, store(t, o), "") // the next daemon's
	if n := d.launched.Load(); n != 1 {
		t.Fatalf("booted %d times, want once", n)
	}
	if get(t, s, "tenant-a") == dir {
		t.Fatal("two scopes have one template")
	}
	if n, bytes := s.Usage(); n != 2 || bytes == 0 {
		t.Fatalf("usage %d, %d bytes", n, bytes)
	}
	if left, _ := filepath.Glob(filepath.Join(o.Run, runPrefix+"*")); len(left) > 0 {
		t.Fatalf("left behind: %v", left)
	}
}

func TestNoRoom(t *testing.T) {
	d := &driver{}
	o := options(t, d)
	o.Config.Size.Memory = 1 << 60
	_, err := store(t, o).Template(t.Context(), "")
	if !errors.Is(err, errdefs.ErrResourceExhausted) || d.launched.Load() != 0 {
		t.Errorf("got %v after %d boots, want %v and none", err, d.launched.Load(), errdefs.ErrResourceExhausted)
	}
	if left, _ := filepath.Glob(filepath.Join(o.Dir, "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestDamagedIsMadeAnew(t *testing.T) {
	for name, damage := range map[string]func(dir string) error{
		"cut short":     func(dir string) error { return os.Truncate(filepath.Join(dir, "memory"), 1) },
		"other content": func(dir string) error { return os.WriteFile(filepath.Join(dir, "state.json"), []byte("stale"), 0o600) },
		"file missing":  func(dir string) error { return os.Remove(filepath.Join(dir, "memory")) },
		"no manifest":   func(dir string) error { return os.Remove(filepath.Join(dir, manifestName)) },
		"bad manifest":  func(dir string) error { return os.WriteFile(filepath.Join(dir, manifestName), []byte("{"), 0o600) },
		"other format": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, manifestName), []byte(`{"format":0}`), 0o600)
		},
		"names a parent": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, manifestName), fmt.Appendf(nil, `{"format":%d,"files":{"../x":{"size":1}}}`, format), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := &driver{}
			o := options(t, d)
			s := store(t, o)
			dir := get(t, s, "")
			if err := damage(dir); err != nil {
				t.Fatal(err)
			}
			s.Failed(dir)
			if get(t, s, "") != dir || d.launched.Load() != 2 {
				t.Fatalf("not made anew: %d boots", d.launched.Load())
			}
			if err := fullCheck(dir); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestUselessIsMadeAnew(t *testing.T) {
	d := &driver{}
	s := store(t, options(t, d))
	dir := get(t, s, "")
	for i, step := range []struct {
		tell func(string)
		made int32
	}{{s.Failed, 1}, {s.Worked, 1}, {s.Failed, 1}, {s.Failed, 2}, {s.Failed, 2}, {s.Failed, 3}} {
		step.tell(dir)
		get(t, s, "")
		if n := d.launched.Load(); n != step.made {
			t.Fatalf("step %d: made %d times, want %d", i, n, step.made)
		}
	}
}

func TestCutShortIsSeenWithoutBeingTold(t *testing.T) {
	d := &driver{}
	s := store(t, options(t, d))
	dir := get(t, s, "")
	if err := os.Truncate(filepath.Join(dir, "memory"), 5); err != nil {
		t.Fatal(err)
	}
	get(t, s, "")
	if d.launched.Load() != 2 {
		t.Fatal("a clone would have got a memory file that was cut short")
	}
}

func TestOfAnotherKeyGoes(t *testing.T) {
	o := options(t, &driver{})
	old := get(t, store(t, o), "")
	o.Depends = []string{"guest 2"}
	s := store(t, o)
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the old one is still there: %v", err)
	}
	if get(t, s, "") == old {
		t.Fatal("same key")
	}
}

// What nobody will clone goes: other scopes than are configured, and namespaces without pods.
func TestUnusedGoes(t *testing.T) {
	o := options(t, &driver{})
	s := store(t, o)
	node, old, used, fresh := get(t, s, ""), get(t, s, "old"), get(t, s, "used"), get(t, s, "new")
	long := time.Now().Add(-unusedMax - time.Hour)
	for _, dir := range []string{node, old, used} {
		if err := os.Chtimes(usedPath(dir), long, long); err != nil {
			t.Fatal(err)
		}
	}
	s.Worked(used)
	for _, step := range []struct {
		wants func(scope string) bool
		kept  []string
	}{
		{nil, []string{node, used, fresh}},
		{func(scope string) bool { return scope != "" }, []string{used, fresh}},
		{func(string) bool { return false }, nil},
	} {
		o.Wants = step.wants
		store(t, o)
		left, err := filepath.Glob(filepath.Join(o.Dir, "*"))
		slices.Sort(step.kept)
		if err != nil || !slices.Equal(left, step.kept) {
			t.Errorf("left are %q, want %q", left, step.kept)
		}
	}
}

func TestFailureLeavesNothingAndIsRemembered(t *testing.T) {
	d := &driver{fail: errdefs.ErrUnavailable}
	o := options(t, d)
	s := store(t, o)
	for range 3 {
		if _, err := s.Template(context.Background(), ""); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Fatalf("got %v", err)
		}
	}
	if d.launched.Load() != 1 {
		t.Fatalf("tried %d times within the pause", d.launched.Load())
	}
	if left, _ := os.ReadDir(o.Dir); len(left) > 0 {
		t.Fatalf("left behind: %v", left)
	}
}

// A daemon that was killed leaves a VMM, which may hang: it ends all the same.
func TestHalfMadeIsTakenBack(t *testing.T) {
	o := options(t, &driver{})
	run := filepath.Join(o.Run, runPrefix+"0123")
	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	p, err := process.Start(process.Spec{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill(context.Background())
	if err := p.Save(run); err != nil {
		t.Fatal(err)
	}
	store(t, o)
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Error("its VMM runs")
	}
	if _, err := os.Stat(run); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its folder is left: %v", err)
	}
}

func TestCloseEndsWhatIsMade(t *testing.T) {
	d := &driver{boots: make(chan *machine, 1)}
	o := options(t, d)
	s := store(t, o)
	failed := make(chan error, 1)
	go func() {
		_, err := s.Template(context.Background(), "")
		failed <- err
	}()
	m := <-d.boots
	s.Close()
	if !m.killed.Load() {
		t.Error("the VM lives on")
	}
	if err := <-failed; err == nil {
		t.Error("there is a template")
	}
	for _, dir := range []string{o.Dir, o.Run} {
		left, _ := filepath.Glob(filepath.Join(dir, "*"))
		if len(left) > 0 && dir == o.Dir || len(left) > 1 {
			t.Errorf("left behind: %v", left)
		}
	}
}

func TestDigestIgnoresHowZerosAreStored(t *testing.T) {
	dir := t.TempDir()
	sparse, full := filepath.Join(dir, "sparse"), filepath.Join(dir, "full")
	content := make([]byte, 3*hashBlock+100)
	copy(content[hashBlock+7:], "data")
	copy(content[3*hashBlock+50:], "end")
	if err := os.WriteFile(full, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(sparse)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.WriteAt([]byte("data"), hashBlock+7)
	f.WriteAt([]byte("end"), 3*hashBlock+50)
	f.Truncate(int64(len(content)))
	a, _, err := digest(sparse)
	if err != nil {
		t.Fatal(err)
	}
	b, _, err := digest(full)
	if err != nil || a != b {
		t.Fatalf("%s and %s, %v", a, b, err)
	}
	f.WriteAt([]byte("D"), hashBlock+7)
	if c, _, _ := digest(sparse); c == a {
		t.Fatal("a changed byte was not seen")
	}
}
