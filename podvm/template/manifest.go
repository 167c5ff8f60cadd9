package template

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/caisson-vm/caisson/internal/atomicfile"
)

// format is the version of the layout and of the manifest.
const format = 3

const manifestName = "template.json"

// manifest is written last, and a folder without it is no template.
type manifest struct {
	Format int             `json:"format"`
	Scope  string          `json:"scope"`
	Files  map[string]file `json:"files"`
}

type file struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

func writeManifest(dir, scope string) error {
	m := manifest{format, scope, map[string]file{}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		sum, size, err := digest(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		m.Files[e.Name()] = file{size, sum}
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, manifestName), data, 0o600)
}

// readManifest returns an error that wraps fs.ErrNotExist where there is no template.
func readManifest(dir string) (manifest, error) {
	var m manifest
	data, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err != nil {
		return m, err
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return m, fmt.Errorf("%s: %w", manifestName, err)
	}
	if m.Format != format || len(m.Files) == 0 {
		return m, fmt.Errorf("%s: format %d with %d files, want format %d", manifestName, m.Format, len(m.Files), format)
	}
	return m, nil
}

// quickCheck compares the files' sizes with the manifest.
func quickCheck(dir string) error {
	m, err := readManifest(dir)
	if err != nil {
		return err
	}
	for name, want := range m.Files {
		if !filepath.IsLocal(name) || strings.Contains(name, "/") {
			return fmt.Errorf("%s names %q", manifestName, name)
		}
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			return fmt.Errorf("incomplete: %s is missing", name)
		}
		if !info.Mode().IsRegular() || info.Size() != want.Size {
			return fmt.Errorf("%s has %d bytes, want %d", name, info.Size(), want.Size)
		}
	}
	return nil
}

// fullCheck compares the files' content with the manifest too.
func fullCheck(dir string) error {
	if err := quickCheck(dir); err != nil {
		return err
	}
	m, err := readManifest(dir)
	if err != nil {
		return err
	}
	for name, want := range m.Files {
		sum, _, err := digest(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if sum != want.SHA256 {
			return fmt.Errorf("%s has another content than when it was made", name)
		}
	}
	return nil
}

// digest hashes a file's data and where it lies; holes, which a memory file mostly is, are skipped.
func digest(path string) (sum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	h := sha256.New()
	for at := int64(0); ; {
		start, err := f.Seek(at, seekData)
		if err != nil { // no data after at
			break
		}
		end, err := f.Seek(start, seekHole)
		if err != nil {
			return "", 0, err
		}
		if at, err = hashData(h, f, max(at, start/hashBlock*hashBlock), end); err != nil {
			return "", 0, err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), info.Size(), nil
}

// SEEK_DATA and SEEK_HOLE of lseek(2).
const (
	seekData = 3
	seekHole = 4
)

// hashBlock is what is hashed at once, with its offset, unless it is all zero: whether zeros are a
// hole or were written must not matter.
const hashBlock = 64 << 10

func hashData(h io.Writer, f *os.File, at, end int64) (next int64, err error) {
	block, zero := make([]byte, hashBlock), make([]byte, hashBlock)
	for ; at < end; at += hashBlock {
		n, err := f.ReadAt(block, at)
		if err != nil && err != io.EOF {
			return 0, err
		}
		if !bytes.Equal(block[:n], zero[:n]) {
			fmt.Fprintf(h, "%d %d\n", at, n)
			h.Write(block[:n])
		}
	}
	return at, nil
}

// diskUsage is what the folder's files take on the disk, in bytes.
func diskUsage(dir string) (total int64) {
	filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := e.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				total += st.Blocks * 512
			}
		}
		return nil
	})
	return total
}

// cpu is what a guest's kernel saw of the processor when it booted.
func cpu() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	var found []string
	for lines := bufio.NewScanner(f); lines.Scan() && lines.Text() != ""; {
		key, value, _ := strings.Cut(lines.Text(), ":")
		switch strings.TrimSpace(key) {
		case "vendor_id", "cpu family", "model", "stepping", "microcode", "flags":
			found = append(found, strings.TrimSpace(value))
		}
	}
	return strings.Join(found, "\n")
}
