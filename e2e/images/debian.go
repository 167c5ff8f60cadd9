package images

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// packages are those whose files the images are made of; libraries are picked from them as the
// programs need them.
var packages = []string{
	"libc6", "busybox", "toybox", "util-linux", "catatonit", "libcrypt1", "zlib1g",
	"nginx", "libpcre2-8-0", "libssl3",
	"apache2-bin", "libapr1", "libaprutil1", "libuuid1", "libexpat1",
}

// unpack downloads what is missing in cache and unpacks the packages into root.
func unpack(ctx context.Context, cache, root string, packages ...string) error {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return fmt.Errorf("unpack packages: %w", err)
	}
	var missing []string
	for _, p := range packages {
		if _, ok := cached(cache, p); !ok {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		get := exec.CommandContext(ctx, "apt-get", append([]string{"download", "-q"}, missing...)...)
		get.Dir = cache
		if out, err := get.CombinedOutput(); err != nil {
			return fmt.Errorf("download %v: %w; run apt-get update first:\n%s", missing, err, out)
		}
	}
	for _, p := range packages {
		file, ok := cached(cache, p)
		if !ok {
			return fmt.Errorf("unpack %s: apt-get left no such package in %s", p, cache)
		}
		if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", file, root).CombinedOutput(); err != nil {
			return fmt.Errorf("unpack %s: %w; delete it and try again:\n%s", file, err, out)
		}
	}
	return nil
}

// cached finds a package's file of whatever version.
func cached(cache, name string) (string, bool) {
	found, err := filepath.Glob(filepath.Join(cache, name+"_*.deb"))
	if err != nil || len(found) == 0 {
		return "", false
	}
	return found[len(found)-1], true
}
