// Command bench measures a container runtime through its CRI socket, and nothing else, so that it
// measures any runtime. With several endpoints it alternates between them within one run, because
// only figures of one run on one machine may be compared, and prints ratios to the first.
//
//	bench --endpoint caisson=unix:///run/caisson/caisson.sock --endpoint containerd=unix:///run/containerd/containerd.sock
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"
)

type options struct {
	endpoints []endpoint
	image     string
	runs      int
	idle      int
	json      string
	parent    string
}

func main() {
	var o options
	flag.Func("endpoint", "`NAME=ADDRESS` of a CRI socket, with +HANDLER at its end for a runtime handler; may be repeated", func(s string) error {
		e, err := parseEndpoint(s)
		o.endpoints = append(o.endpoints, e)
		return err
	})
	flag.StringVar(&o.image, "image", "docker.io/library/busybox:latest", "`image` of the container; must be able to sleep")
	flag.IntVar(&o.runs, "runs", 10, "measured pods per endpoint, after one that is not counted")
	flag.IntVar(&o.idle, "idle", 0, "then start this many idle pods per endpoint and measure them together")
	flag.StringVar(&o.json, "json", "", "write the figures to this `file` too")
	flag.StringVar(&o.parent, "cgroup-parent", "", "cgroup parent of the pods")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	if len(o.endpoints) == 0 || o.runs < 1 {
		return errors.New("give at least one --endpoint and one run")
	}
	var all []*subject
	for _, e := range o.endpoints {
		s, err := connect(ctx, e, o)
		if err != nil {
			return err
		}
		defer s.close()
		all = append(all, s)
	}
	for i := range o.runs + 1 {
		for _, s := range all {
			if err := s.cycle(ctx, i > 0); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			fmt.Fprintf(os.Stderr, "\r%s: pod %d of %d   ", s.name, i, o.runs)
		}
	}
	fmt.Fprintln(os.Stderr)
	for _, s := range all {
		if o.idle > 0 {
			if err := s.density(ctx, o.idle); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	report := newReport(all)
	fmt.Print(report)
	if o.json == "" {
		return nil
	}
	data, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(o.json, append(data, '\n'), 0o644)
}

type endpoint struct{ name, address, handler string }

func parseEndpoint(s string) (endpoint, error) {
	name, address, ok := strings.Cut(s, "=")
	if !ok || name == "" || address == "" {
		return endpoint{}, fmt.Errorf("endpoint %q: want NAME=ADDRESS", s)
	}
	address, handler, _ := strings.Cut(address, "+")
	return endpoint{name, address, handler}, nil
}

// opLimit bounds each call: a runtime that hangs ends the benchmark with an error.
const opLimit = 3 * time.Minute
