// Command bench measures a container runtime through its CRI socket. With several endpoints it
// alternates between them within one run, and prints ratios to the first.
//
//	bench --endpoint caisson=unix:///run/caisson/caisson.sock --endpoint containerd=unix:///run/containerd/containerd.sock
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"github.com/caisson-vm/caisson/e2e/measure"
)

func main() {
	o := measure.Options{Progress: os.Stderr}
	var file string
	flag.Func("endpoint", "`NAME=ADDRESS` of a CRI socket, with +HANDLER at its end for a runtime handler; may be repeated", func(s string) error {
		e, err := measure.ParseEndpoint(s)
		o.Endpoints = append(o.Endpoints, e)
		return err
	})
	flag.StringVar(&o.Image, "image", "docker.io/library/busybox:latest", "`image` of the container; must be able to sleep")
	flag.IntVar(&o.Runs, "runs", 10, "measured pods per endpoint, after one that is not counted")
	flag.IntVar(&o.Idle, "idle", 0, "then start this many idle pods per endpoint and measure them together")
	flag.StringVar(&o.CgroupParent, "cgroup-parent", "", "cgroup parent of the pods")
	flag.StringVar(&file, "json", "", "write the figures to this `file` too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o, file); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o measure.Options, file string) error {
	report, err := measure.Run(ctx, o)
	if err != nil {
		return err
	}
	fmt.Print(report)
	if file == "" {
		return nil
	}
	data, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}
