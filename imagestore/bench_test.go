package imagestore

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/imagestore/internal/torture"
)

// benchLayers are three layers of files as programs have them, about 300 MB packed and 800 MB
// plain, and their packed forms.
func benchLayers() (plain, packed [][]byte) {
	rnd := rand.New(rand.NewPCG(1, 2))
	words := make([]string, 5000)
	for i := range words {
		words[i] = torture.Noise(3+i%9, uint64(i))
	}
	for l := range 3 {
		t := torture.NewTar()
		for f := range 1500 {
			var b strings.Builder
			for size := 1 << (8 + rnd.IntN(13)); b.Len() < size; {
				b.WriteString(words[int(rnd.ExpFloat64()*400)%len(words)])
			}
			t.File(fmt.Sprintf("layer%d/%04d", l, f), b.String())
		}
		plain = append(plain, t.Bytes())
		packed = append(packed, gzipped(plain[l]))
	}
	return plain, packed
}

// BenchmarkPull compares a pull, with conversion and all checks, from a registry in this process
// with doing nothing but decompress the same layers, alternating. The promise is a ratio of at most
// 1.2.
func BenchmarkPull(b *testing.B) {
	r := newTestRegistry(b)
	plain, packed := benchLayers()
	next := 0
	r.push("bench", testImage{layers: plain, pack: func([]byte) []byte { next++; return packed[next-1] }})
	var packedSize, plainSize int64
	for i := range plain {
		packedSize, plainSize = packedSize+int64(len(packed[i])), plainSize+int64(len(plain[i]))
	}
	plain = nil
	debug.FreeOSMemory()
	s := newStore(b)
	var pulling, decompressing time.Duration
	for b.Loop() {
		start := time.Now()
		for _, layer := range packed {
			z, err := gzip.NewReader(bytes.NewReader(layer))
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, z); err != nil {
				b.Fatal(err)
			}
		}
		decompressing += time.Since(start)
		start = time.Now()
		i := mustPull(b, s, r.host+"/bench:1")
		pulling += time.Since(start)
		if err := s.Remove(b.Context(), i.ID); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(pulling)/float64(decompressing), "pull/gunzip")
	b.ReportMetric(peak(b, r.host+"/bench:1"), "MB-peak")
	b.ReportMetric(float64(packedSize)/1e6, "MB-packed")
	b.ReportMetric(float64(plainSize)/1e6, "MB-plain")
	b.ReportMetric(float64(pulling.Milliseconds())/float64(b.N), "ms/pull")
}

// BenchmarkSmallPull is a pull of which nearly all is what any pull takes.
func BenchmarkSmallPull(b *testing.B) {
	r, s := newTestRegistry(b), newStore(b)
	r.push("a", small("x"))
	for b.Loop() {
		if err := s.Remove(b.Context(), mustPull(b, s, r.host+"/a:1").ID); err != nil {
			b.Fatal(err)
		}
	}
}

// maxPeak is the promise for the memory of a pull, in MB.
const maxPeak = 100

// testPuller is this program, as the process of a pull.
var testPuller = []string{"/proc/self/exe", "process of a pull"}

// TestMain is also the process of a pull, and another one in which pulls show their memory.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == testPuller[1] {
		if err := ServePull(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if ref := os.Getenv("CAISSON_TEST_PULL"); ref != "" {
		if err := pullAlone(os.Getenv("CAISSON_TEST_ROOT"), ref); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// pullAlone pulls and prints the highest memory of the pull's process and what this one has more than before, in KiB.
func pullAlone(root, ref string) error {
	s, err := Open(Options{Root: root, Puller: testPuller})
	if err != nil {
		return err
	}
	defer s.Close()
	before, err := resident()
	if err != nil {
		return err
	}
	if _, err := s.Pull(context.Background(), ref, nil); err != nil {
		return err
	}
	after, err := resident()
	if err != nil {
		return err
	}
	var children unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &children); err != nil {
		return err
	}
	_, err = fmt.Println(children.Maxrss + after - before)
	return err
}

// resident returns this process's highest memory so far, in KiB.
func resident() (int64, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, peak, _ := strings.Cut(string(status), "VmHWM:")
	return strconv.ParseInt(strings.Fields(peak)[0], 10, 64)
}

// peak returns the highest memory that a pull takes, in MB.
func peak(t testing.TB, ref string) float64 {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CAISSON_TEST_PULL="+ref, "CAISSON_TEST_ROOT="+t.TempDir())
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("pull in a process of its own: %v", err)
	}
	kb, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	return float64(kb) / 1024
}

func TestPullNeedsLittleMemory(t *testing.T) {
	r := newTestRegistry(t)
	many := torture.NewTar()
	for i := range 20_000 {
		many.File(fmt.Sprintf("many/%d", i), "x")
	}
	i := large(1, 64)
	i.layers = append(i.layers, large(2, 64).layers[0], many.Bytes())
	for name, pack := range map[string]func([]byte) []byte{"gzip": gzipped, "zstd": zstded} {
		i.pack = pack
		r.push(name, i)
		got := peak(t, r.host+"/"+name+":1")
		t.Logf("%s: %.0f MB", name, got)
		if got > maxPeak {
			t.Errorf("%s: a pull took %.0f MB, at most %d are promised", name, got, maxPeak)
		}
	}
}
