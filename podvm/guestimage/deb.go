package guestimage

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// deb is a Debian package as apt knows it.
type deb struct {
	name, version, arch, sha256 string
	// depends holds the first alternative of each dependency.
	depends []string
}

// file is the name apt-get download gives it.
func (d deb) file() string {
	return d.name + "_" + strings.ReplaceAll(d.version, ":", "%3a") + "_" + d.arch + ".deb"
}

// candidates asks apt which versions of the packages it would install.
func candidates(ctx context.Context, names ...string) ([]deb, error) {
	out, err := run(ctx, "", "apt-cache", append([]string{"show", "--no-all-versions"}, names...)...)
	if err != nil {
		return nil, fmt.Errorf("look up Debian packages (is this Debian, and was 'apt-get update' run?): %w", err)
	}
	found := make(map[string]deb)
	for stanza := range strings.SplitSeq(string(out), "\n\n") {
		d := parseStanza(stanza)
		if _, ok := found[d.name]; !ok {
			found[d.name] = d
		}
	}
	debs := make([]deb, 0, len(names))
	for _, name := range names {
		d, ok := found[name]
		if !ok || d.sha256 == "" {
			return nil, fmt.Errorf("apt knows no package %s, run 'apt-get update'", name)
		}
		debs = append(debs, d)
	}
	return debs, nil
}

func parseStanza(stanza string) deb {
	var d deb
	for line := range strings.SplitSeq(stanza, "\n") {
		key, value, ok := strings.Cut(line, ": ")
		if !ok || strings.HasPrefix(key, " ") {
			continue
		}
		switch key {
		case "Package":
			d.name = value
		case "Version":
			d.version = value
		case "Architecture":
			d.arch = value
		case "SHA256":
			d.sha256 = value
		case "Depends", "Pre-Depends":
			for dep := range strings.SplitSeq(value, ",") {
				first, _, _ := strings.Cut(dep, "|")
				name, _, _ := strings.Cut(strings.TrimSpace(first), " ")
				name, _, _ = strings.Cut(name, ":")
				d.depends = append(d.depends, name)
			}
		}
	}
	return d
}

// download returns the path of the package's file, taken from the cache or fetched into it.
func download(ctx context.Context, cache string, d deb) (string, error) {
	target := filepath.Join(cache, d.file())
	if checkSum(target, d.sha256) == nil {
		return target, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, ".download-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if _, err := run(ctx, tmp, "apt-get", "-o", "APT::Sandbox::User=root", "download", d.name+"="+d.version); err != nil {
		return "", fmt.Errorf("download %s %s: %w", d.name, d.version, err)
	}
	got := filepath.Join(tmp, d.file())
	if err := checkSum(got, d.sha256); err != nil {
		return "", fmt.Errorf("download %s %s: %w", d.name, d.version, err)
	}
	return target, os.Rename(got, target)
}

func checkSum(file, want string) error {
	got, err := describe(file)
	if err != nil {
		return err
	}
	if got.SHA256 != want {
		return fmt.Errorf("%s has the SHA-256 %s, apt's index says %s", filepath.Base(file), got.SHA256, want)
	}
	return nil
}

// describe reads a file's size and hash.
func describe(file string) (File, error) {
	f, err := os.Open(file)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return File{}, err
	}
	return File{Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}, nil
}

// unpack calls take for every entry of the package at file. Names are clean and relative, and a
// merged /usr is undone: usr/lib/x is lib/x.
func unpack(ctx context.Context, file string, take func(name string, h *tar.Header, r io.Reader) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", file)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("unpack %s: %w", filepath.Base(file), err)
	}
	err = readTar(out, take)
	if err != nil {
		cancel()
	}
	if wait := cmd.Wait(); err == nil && wait != nil {
		err = fmt.Errorf("%w: %s", wait, bytes.TrimSpace(stderr.Bytes()))
	}
	if err != nil {
		return fmt.Errorf("unpack %s: %w", filepath.Base(file), err)
	}
	return nil
}

func readTar(r io.Reader, take func(name string, h *tar.Header, r io.Reader) error) error {
	buffered := bufio.NewReaderSize(r, 1<<20)
	t := tar.NewReader(buffered)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, buffered)
			return err
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		for _, dir := range []string{"lib/", "lib64/", "bin/", "sbin/"} {
			if strings.HasPrefix(name, "usr/"+dir) {
				name = strings.TrimPrefix(name, "usr/")
			}
		}
		if err := take(name, h, t); err != nil {
			return err
		}
	}
}

// run runs a command and returns its output; its complaints are in the error.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, args[0], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}
