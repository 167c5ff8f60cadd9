// Command prepare makes what the end-to-end tests need besides Caisson itself: the images, and
// crictl, critest and ginkgo from sigs.k8s.io/cri-tools. Run it from the module's folder.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/caisson-vm/caisson/e2e/images"
	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	output := flag.String("output", "build", "`folder` for images/, debs/ and tools/")
	what := flag.String("only", "", "make only this: images, tools, or demo, which is the images and crictl")
	flag.Parse()
	if err := prepare(ctx, *output, *what); err != nil {
		fmt.Fprintf(os.Stderr, "prepare: %v\n", err)
		os.Exit(1)
	}
}

func prepare(ctx context.Context, output, what string) error {
	output, err := filepath.Abs(output)
	if err != nil {
		return err
	}
	switch what {
	case "", "images", "tools", "demo":
	default:
		return fmt.Errorf("--only %s: it is images, tools or demo", what)
	}
	if what != "images" {
		dir, all := filepath.Join(output, "tools"), what != "demo"
		if err := step("tools, from their source", func() error { return tools(ctx, dir, all) }); err != nil {
			return err
		}
	}
	if what != "tools" {
		dir, cache := filepath.Join(output, "images"), filepath.Join(output, "debs")
		return step("images", func() error { return images.Build(ctx, dir, cache) })
	}
	return nil
}

// step tells what is being done and how long it took.
func step(name string, do func() error) error {
	start := time.Now()
	fmt.Printf("%s ...\n", name)
	if err := do(); err != nil {
		return err
	}
	fmt.Printf("%s done in %.1f s\n", name, time.Since(start).Seconds())
	return nil
}

// version has the tools say which version they are, as their releases do.
const version = "-ldflags=-X sigs.k8s.io/cri-tools/pkg/version.Version=v1.36.0"

// tools builds the programs that e2e/tools, a module of its own, pins: crictl, or all of them.
func tools(ctx context.Context, dir string, all bool) error {
	builds := [][]string{{"build", "-trimpath", version, "-o", dir + "/", "sigs.k8s.io/cri-tools/cmd/crictl"}}
	if all {
		builds = append(builds,
			[]string{"build", "-trimpath", "-o", dir + "/", "github.com/onsi/ginkgo/v2/ginkgo"},
			[]string{"test", "-c", "-trimpath", version, "-o", filepath.Join(dir, "critest"), "sigs.k8s.io/cri-tools/cmd/critest"})
	}
	for _, args := range builds {
		run := exec.CommandContext(ctx, "go", args...)
		run.Dir = filepath.Join("e2e", "tools")
		run.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		run.Stdout, run.Stderr = os.Stdout, os.Stderr
		if err := run.Run(); err != nil {
			return fmt.Errorf("build tools, run from the module's folder: %w", err)
		}
	}
	return nil
}
