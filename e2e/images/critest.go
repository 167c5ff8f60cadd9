package images

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// staging is the registry of critest's own images.
const staging = "gcr.io/k8s-staging-cri-tools/"

// critest are the images of critest v1.36 that servers has not.
// Source: sigs.k8s.io/cri-tools/images/build.
func critest(ctx context.Context, _ string, b *base) ([]Image, error) {
	var all []Image
	add := func(config v1.Config, top *Layer, refs ...string) error {
		single, err := b.with(config, top)
		if err != nil {
			return fmt.Errorf("image %s: %w", refs[0], err)
		}
		all = append(all, Image{Refs: refs, Single: single})
		return nil
	}
	// Images that differ by one empty file, which is named like them.
	for file, refs := range map[string][]string{
		"test-image-1":      {staging + "test-image-1:latest"},
		"test-image-2":      {staging + "test-image-2:latest"},
		"test-image-3":      {staging + "test-image-3:latest"},
		"test-image-latest": {staging + "test-image-latest:latest"},
		"test-image-digest": {staging + "test-image-digest:latest"},
		"same-image":        {staging + "test-image-tags:1", staging + "test-image-tags:2", staging + "test-image-tags:3"},
		"test":              {staging + "test-image-tag:test"},
		"all":               {staging + "test-image-tag:all"},
	} {
		if err := add(busybox(), new(Layer).File(file, 0o644, ""), refs...); err != nil {
			return nil, err
		}
	}
	// Images with a user.
	for image, user := range map[string]string{
		"test-image-user-uid":            "1002",
		"test-image-user-username":       "www-data",
		"test-image-user-uid-group":      "1003:1004",
		"test-image-user-username-group": "www-data:1004",
	} {
		config := busybox()
		config.User = user
		if err := add(config, new(Layer).File(image, 0o644, ""), staging+image+":latest"); err != nil {
			return nil, err
		}
	}
	config := busybox()
	config.User = "1000"
	groups := new(Layer).
		File("etc/passwd", 0o644, passwd+"default-user:x:1000:1000::/home/default-user:/bin/sh\n").
		File("etc/group", 0o644, group+"default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
	if err := add(config, groups, staging+"test-image-predefined-group:latest"); err != nil {
		return nil, err
	}
	program, err := nnp(ctx)
	if err != nil {
		return nil, err
	}
	setuid := new(Layer).File("nnp", 0o4755, program)
	err = add(v1.Config{Cmd: []string{"/nnp"}}, setuid, "registry.k8s.io/e2e-test-images/nonewprivs:1.3")
	return all, err
}

// nnp builds the program of that name.
func nnp(ctx context.Context) (string, error) {
	dir, err := os.MkdirTemp("", "caisson-nnp-")
	if err != nil {
		return "", fmt.Errorf("build nnp: %w", err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "nnp")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, "github.com/caisson-vm/caisson/e2e/images/nnp")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build nnp: %w\n%s", err, out)
	}
	program, err := os.ReadFile(file)
	return string(program), err
}
