package cloudhv

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/caisson-vm/caisson/podvm/vmm"
	"github.com/caisson-vm/caisson/podvm/vmm/machine"
	"github.com/caisson-vm/caisson/podvm/vmm/process"
	"github.com/caisson-vm/caisson/podvm/vmm/tail"
	"github.com/caisson-vm/caisson/podvm/vmm/vmmtest"
)

// program writes an executable that prints text.
func program(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cloud-hypervisor")
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho '"+text+"'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestMain(m *testing.M) { vmmtest.Main(m) }

func TestVersionIsChecked(t *testing.T) {
	for _, tt := range []struct {
		text string
		want error
	}{
		{"cloud-hypervisor v54.0.0", nil},
		{"cloud-hypervisor v51.1", nil},
		{"cloud-hypervisor v50.2.0", errdefs.ErrFailedPrecondition},
		{"cloud-hypervisor v54.0-dirty-ab12", nil},
		{"something else", errdefs.ErrFailedPrecondition},
	} {
		d, err := New(context.Background(), program(t, tt.text))
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.text, err, tt.want)
		}
		if err == nil {
			d.Close()
		}
	}
	if _, err := New(context.Background(), "no-such-vmm"); !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), "vm.cloud_hypervisor") {
		t.Errorf("missing binary: %v", err)
	}
}

// A VMM that ends at once must not be waited for, and leaves nothing.
func TestVMMThatDiesAtStart(t *testing.T) {
	d, err := New(context.Background(), program(t, "cloud-hypervisor v54.0.0"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err = d.Launch(ctx, vmm.Config{ID: "x", Dir: dir, Size: vmm.Size{CPUs: 1, Memory: 1 << 28}, Max: vmm.Size{CPUs: 1, Memory: 1 << 28}})
	if !errors.Is(err, vmm.ErrGone) || !strings.Contains(err.Error(), "log ends: cloud-hypervisor v54.0.0") {
		t.Fatalf("got %v", err)
	}
	left, _ := filepath.Glob(dir + "/*")
	for _, path := range left {
		if !strings.HasSuffix(path, ".log") {
			t.Errorf("left behind: %s", path)
		}
	}
}

func TestCloneHasItsOwnPaths(t *testing.T) {
	snapshot := `{"cpus":{"boot_vcpus":1},"memory":{"zones":[{"id":"mem0","size":268435456,"file":"/old/memory","shared":true,"hotplug_size":18446744073709551615}]},
		"vsock":{"cid":3,"socket":"/old/vsock.sock"},"serial":{"mode":"File","file":"/old/console"},"pmem":[{"id":"primer","file":"/old/primer","discard_writes":true}],"later":{"key":[1]}}`
	data, err := cloneConfig([]byte(snapshot), vmm.Config{Dir: "/run/pod", Template: "/t"})
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	if strings.Contains(text, "/old") || !strings.Contains(text, `"file":"/t/memory"`) || !strings.Contains(text, `"shared":false`) || !strings.Contains(text, `"file":"/t/primer"`) {
		t.Errorf("paths or sharing of the template: %s", text)
	}
	if !strings.Contains(text, `"later":{"key":[1]}`) || !strings.Contains(text, "18446744073709551615") {
		t.Errorf("what is not known was changed: %s", text)
	}
	for _, bad := range []string{``, `[]`, `{}`, `{"memory":{"zones":[{"id":"mem0"}]},"vsock":{},"serial":{}}`, `{"memory":{"zones":[7]},"vsock":{},"serial":{}}`} {
		if _, err := cloneConfig([]byte(bad), vmm.Config{}); err == nil {
			t.Errorf("took %q for a template", bad)
		}
	}
}

func TestEventsAreReadInPieces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.json")
	r := eventReader{path: path}
	text := "{\n \"source\": \"vm\",\n \"event\": \"booted\",\n \"properties\": null\n}\n\n{\"source\":\"guest\",\"event\":\"panic\",\"properties\":{\"event\":\"panic\"}}\n\n"
	var got []string
	for i := range len(text) + 1 {
		if err := os.WriteFile(path, []byte(text[:i]), 0o600); err != nil {
			t.Fatal(err)
		}
		all, err := r.next()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range all {
			got = append(got, e.Source+" "+e.Event)
		}
	}
	if strings.Join(got, ", ") != "vm booted, guest panic" {
		t.Fatalf("got %v", got)
	}
	if err := os.WriteFile(path, make([]byte, eventsMax+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.next(); err == nil {
		t.Fatal("read a flood")
	}
}

func TestHandshake(t *testing.T) {
	for _, tt := range []struct{ answer, want string }{
		{"OK 1073741824\nfirst bytes", ""},
		{"", "refused"},
		{"NO\n", "unexpected"},
		{strings.Repeat("x", 100), "unexpected"},
	} {
		host, guest := net.Pipe()
		go func() {
			guest.Read(make([]byte, 64))
			guest.Write([]byte(tt.answer))
			guest.Close()
		}()
		err := handshake(host, 1024)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: got %v, want %q", tt.answer, err, tt.want)
		}
		host.Close()
	}
}

// A guest that does not answer the first connection, or refuses it, is asked again; one that refuses
// all is not asked for ever.
func TestUnansweredConnection(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", vsockPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for i := 0; ; i++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			switch conn.Read(make([]byte, 64)); i {
			case 0: // no answer
			case 1, 3:
				conn.Write([]byte("OK 1073741825\n"))
			default:
				conn.Close()
			}
		}
	}()
	p, err := process.Start(process.Spec{Path: "/bin/sleep", Args: []string{"100"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill(context.Background())
	v := &vm{VM: machine.New(vmm.Config{Dir: dir}, p, tail.Pair{})}
	conn, err := v.connect(t.Context(), 1024)
	if err != nil {
		t.Fatalf("after no answer: %v", err)
	}
	conn.Close()
	if conn, err = v.connect(t.Context(), 1024); err != nil {
		t.Fatalf("after one refusal: %v", err)
	}
	conn.Close()
	if _, err := v.connect(t.Context(), 1024); !errors.Is(err, io.EOF) {
		t.Fatalf("after all were refused: %v", err)
	}
}

// A VM is attached to although the binary is gone; none is launched.
func TestAttachNeedsNoBinary(t *testing.T) {
	d, err := AttachOnly(errdefs.ErrNotFound)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	dir := t.TempDir()
	p, err := process.Start(process.Spec{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill(context.Background())
	l, err := net.Listen("unix", apiPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	api := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte(`{"config":{"cpus":{"boot_vcpus":3}},"memory_actual_size":4096}`))
	})}
	go api.Serve(l)
	defer api.Close()
	if err := errors.Join(p.Save(dir), os.WriteFile(eventsPath(dir), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	v, err := d.Attach(t.Context(), vmm.Config{ID: "x", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if i := v.Info(); i.PID != p.PID() || i.Size != (vmm.Size{CPUs: 3, Memory: 4096}) {
		t.Errorf("got %+v", i)
	}
	if err := v.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := d.Launch(t.Context(), vmm.Config{ID: "x", Dir: dir}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("launch: %v", err)
	}
}

func TestAPIErrorIsOneLine(t *testing.T) {
	data, _ := json.Marshal([]string{"Error from API", "The VM could not boot"})
	err := apiError("vm.boot", 500, data)
	if err.Error() != "cloud hypervisor vm.boot: Error from API: The VM could not boot (500): internal" {
		t.Fatal(err)
	}
	if err := apiError("vm.info", 404, []byte("no")); !errors.Is(err, errdefs.ErrNotFound) {
		t.Fatal(err)
	}
}

func TestMemoryIsPluggedInBlocks(t *testing.T) {
	v := &vm{VM: &machine.VM{Config: vmm.Config{Size: vmm.Size{Memory: 256 << 20}, Max: vmm.Size{Memory: 1<<30 + 5}}}}
	for _, tt := range []struct{ ask, want int64 }{
		{0, 256 << 20}, {256 << 20, 256 << 20}, {256<<20 + 1, 384 << 20}, {512 << 20, 512 << 20}, {1 << 40, 1 << 30},
	} {
		if got := v.plan(tt.ask); got != tt.want {
			t.Errorf("plan(%d) = %d, want %d", tt.ask, got, tt.want)
		}
	}
}

func TestTemplateMustHaveItsMemory(t *testing.T) {
	c := vmm.Config{Template: t.TempDir(), Dir: t.TempDir()}
	config := []byte(`{"memory":{"zones":[{"id":"mem0","size":4096,"file":"/old/memory","hotplug_size":18446744073709551615}]}}`)
	for _, tt := range []struct {
		bytes int64
		want  error
	}{{-1, os.ErrNotExist}, {2048, errdefs.ErrDataLoss}, {4096, nil}} {
		if tt.bytes >= 0 {
			if err := os.WriteFile(filepath.Join(c.Template, "memory"), make([]byte, tt.bytes), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := checkMemory(config, c); !errors.Is(err, tt.want) {
			t.Errorf("%d bytes: got %v, want %v", tt.bytes, err, tt.want)
		}
	}
}

// TestPanicAgainAndAgain: a guest that says so does not put off its end.
func TestPanicAgainAndAgain(t *testing.T) {
	w, err := newWatcher()
	if err != nil {
		t.Fatal(err)
	}
	d := &Driver{watcher: w}
	defer d.Close()
	c := vmm.Config{ID: "pod", Dir: t.TempDir()}
	events, err := os.Create(eventsPath(c.Dir))
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	l, err := tail.OpenPair(c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	p, err := process.Start(process.Spec{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill(context.Background())
	v, err := newVM(d, c, p, l)
	if err != nil {
		t.Fatal(err)
	}
	go v.watch()
	limit := time.After(20 * panicDelay)
	for again := time.Tick(panicDelay / 4); ; {
		select {
		case <-again:
			if _, err := events.WriteString(`{"source":"guest","event":"panic"}`); err != nil {
				t.Fatal(err)
			}
		case <-v.Done():
			if err := v.Info().Err; err == nil || !strings.Contains(err.Error(), "panicked") {
				t.Errorf("it ended by %v", err)
			}
			return
		case <-limit:
			t.Fatal("it does not end")
		}
	}
}
