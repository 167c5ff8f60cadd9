package tail

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func open(t *testing.T, path string, drop ...string) (*Log, *os.File) {
	t.Helper()
	l, err := Open(path, drop...)
	if err != nil {
		t.Fatal(err)
	}
	w, err := l.Writer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close(); l.Close() })
	return l, w
}

func TestEndOfAProcessesOutput(t *testing.T) {
	l, w := open(t, filepath.Join(t.TempDir(), "console.log"))
	c := exec.Command("sh", "-c", "seq 1000; echo Kernel panic")
	c.Stdout = w
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	if got := l.String(); !strings.HasSuffix(got, "\n1000\nKernel panic") || len(got) > tailMax {
		t.Fatalf("got %q", got)
	}
}

func TestFileStaysSmall(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	l, w := open(t, path)
	line := []byte(strings.Repeat("x", 1023) + "\n")
	for range 1000 {
		for { // a full pipe refuses; what was refused is tried again when the log was read
			if _, err := w.Write(line); err == nil {
				break
			}
			_ = l.String()
		}
	}
	w.Write([]byte("last"))
	if got := l.String(); !strings.HasSuffix(got, "x\nlast") {
		t.Fatalf("got %q", got)
	}
	if info, err := os.Stat(path); err != nil || info.Size() > fileMax {
		t.Fatalf("%d bytes, %v", info.Size(), err)
	}
}

func TestNextDaemonGoesOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	l, w := open(t, path)
	w.Write([]byte("one "))
	l.Close()
	w.Write([]byte("two "))
	l, w = open(t, path)
	w.Write([]byte("three"))
	if got := l.String(); got != "one two three" {
		t.Fatalf("got %q", got)
	}
}

func TestNoiseIsDropped(t *testing.T) {
	l, w := open(t, filepath.Join(t.TempDir(), "vmm.log"), "noise", "hum")
	for _, part := range []string{"one\nno", "ise 1\ntwo\n", "a hum\n\nthree\nnoise", " 2\nfo", "ur"} {
		w.Write([]byte(part))
	}
	if got := l.String(); got != "one\ntwo\n\nthree\nfour" {
		t.Fatalf("got %q", got)
	}
	w.Write([]byte(" and more\n" + strings.Repeat("x", 2*lineMax) + "\nnoise\nend"))
	if got := l.String(); !strings.HasSuffix(got, "xx\nend") {
		t.Fatalf("got %q", got)
	}
	if got := len(Read(l.path)); got != tailMax {
		t.Fatalf("%d bytes, want %d", got, tailMax)
	}
}

func TestReasonOfAPanic(t *testing.T) {
	dir := t.TempDir()
	p, err := OpenPair(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if got := p.Panic().Error(); got != "the guest's kernel panicked" {
		t.Errorf("without a word: got %q", got)
	}
	text := "[ 1.0] Kernel panic - not syncing: Attempted to kill init!\r\n" + strings.Repeat("[ 1.0] registers\r\n", 200)
	if err := os.WriteFile(ConsolePath(dir), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := p.Panic().Error(); got != "the guest's kernel panicked: Attempted to kill init!" {
		t.Errorf("got %q", got)
	}
}
