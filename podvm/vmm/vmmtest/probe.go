package vmmtest

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// probeArg makes the test program the probe: what runs in the guest, in a container, and tells the
// test what it sees there.
const probeArg = "vmmtest-probe"

// Main is the TestMain of a package whose tests call Run: it makes the program the probe where it
// runs in a guest.
func Main(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == probeArg {
		fmt.Fprintln(os.Stderr, "probe:", serveProbe(os.Args[2]))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// serveProbe answers calls on a TCP port of the guest, and says when it is ready.
func serveProbe(port string) error {
	l, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	if err := rpc.Register(Probe{}); err != nil {
		return err
	}
	fmt.Println(probeReady)
	rpc.Accept(l)
	return io.EOF
}

const probeReady = "ready"

// Probe is what net/rpc serves in the guest.
type Probe struct{}

// Span is a part of a file, in bytes.
type Span struct {
	Path   string
	Offset int64
	Size   int
	Data   []byte
}

// Read reads a span. What ends before its Size is no error.
func (Probe) Read(s Span, data *[]byte) error {
	f, err := os.Open(s.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	if s.Offset > 0 {
		if _, err := f.Seek(s.Offset, io.SeekStart); err != nil {
			return err
		}
	}
	*data, err = io.ReadAll(io.LimitReader(f, int64(s.Size)))
	return err
}

// Write writes a span's Data and syncs it where the file can be synced; a missing file is made.
func (Probe) Write(s Span, _ *struct{}) error {
	f, err := os.OpenFile(s.Path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if s.Offset > 0 {
		if _, err := f.Seek(s.Offset, io.SeekStart); err != nil {
			return err
		}
	}
	if _, err := f.Write(s.Data); err != nil {
		return err
	}
	f.Sync() // not in /proc
	return nil
}

// Glob lists files.
func (Probe) Glob(pattern string, found *[]string) (err error) {
	*found, err = filepath.Glob(pattern)
	return err
}

// filled is what Fill wrote to.
var filled []byte

// Fill writes to so many bytes of memory.
func (Probe) Fill(size int, _ *struct{}) (err error) {
	if filled, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE); err != nil {
		return err
	}
	for i := 0; i < size; i += os.Getpagesize() {
		filled[i] = 1
	}
	return nil
}

// Free gives back what Fill wrote to.
func (Probe) Free(struct{}, *struct{}) error { return unix.Munmap(filled) }

// call makes a call that ends with ctx.
func call(ctx context.Context, c *rpc.Client, method string, args, reply any) error {
	done := c.Go("Probe."+method, args, reply, make(chan *rpc.Call, 1)).Done
	select {
	case r := <-done:
		if r.Error != nil {
			return fmt.Errorf("probe %s: %w", method, r.Error)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("probe %s: %w", method, context.Cause(ctx))
	}
}

// program lists the files that the test program needs to run: itself and, where it is linked so,
// its loader and its libraries.
func program() (map[string]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	files := map[string]string{probePath: self}
	f, err := elf.Open(self)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		name, err := io.ReadAll(p.Open())
		if err != nil {
			return nil, err
		}
		loader := string(bytes.TrimRight(name, "\x00"))
		files[loader] = loader
	}
	names, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		found, err := filepath.Glob("/lib/*-linux-gnu/" + name)
		if err != nil || len(found) != 1 {
			return nil, fmt.Errorf("the test program needs %s, found %v: build it with CGO_ENABLED=0", name, found)
		}
		files["/lib/"+name] = found[0]
	}
	return files, nil
}

const probePath = "/probe"
