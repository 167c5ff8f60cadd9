// Package measure measures container runtimes through their CRI sockets, and nothing else, so that
// it measures any runtime. Several of them alternate within one run, because only figures of one run
// on one machine may be compared.
package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Options of a run.
type Options struct {
	// Endpoints are the runtimes; ratios are to the first.
	Endpoints []Endpoint
	// Image of the container; it must be able to sleep.
	Image string
	// Runs is the number of measured pods per endpoint, after one that is not counted.
	Runs int
	// Idle pods per endpoint are then started beside one another and measured together.
	Idle int
	// CgroupParent of the pods.
	CgroupParent string
	// Progress, where set, hears what is going on.
	Progress io.Writer
}

// Endpoint is a runtime.
type Endpoint struct {
	Name string
	// Address of its CRI socket, as gRPC writes it.
	Address string
	// Handler is the runtime handler of its pods; may be empty.
	Handler string
	// Against names another endpoint to which there are ratios, too.
	Against string
	// Boot, where set, does what any pod of this runtime has to wait for, for comparison.
	Boot func(context.Context) error
	// Settle, where set, is called after each pod: it returns when the runtime has done what it does
	// ahead of the next one.
	Settle func(context.Context) error
}

// ParseEndpoint reads NAME=ADDRESS or NAME=ADDRESS+HANDLER.
func ParseEndpoint(s string) (Endpoint, error) {
	name, address, ok := strings.Cut(s, "=")
	if !ok || name == "" || address == "" {
		return Endpoint{}, fmt.Errorf("endpoint %q: want NAME=ADDRESS", s)
	}
	address, handler, _ := strings.Cut(address, "+")
	return Endpoint{Name: name, Address: address, Handler: handler}, nil
}

// opLimit bounds each call: a runtime that hangs ends the run with an error.
const opLimit = 3 * time.Minute

// Run measures. What it made is removed also when it fails.
func Run(ctx context.Context, o Options) (Report, error) {
	if len(o.Endpoints) == 0 || o.Runs < 1 {
		return Report{}, errors.New("measure: want at least one endpoint and one run")
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	var all []*subject
	for _, e := range o.Endpoints {
		s, err := connect(ctx, e, o)
		if err != nil {
			return Report{}, err
		}
		defer s.close()
		all = append(all, s)
	}
	for i := range o.Runs + 1 {
		for _, s := range all {
			fmt.Fprintf(o.Progress, "%s: pod %d of %d\n", s.Name, i, o.Runs)
			if err := s.cycle(ctx, i > 0); err != nil {
				return Report{}, fmt.Errorf("%s: %w", s.Name, err)
			}
		}
	}
	for _, s := range all {
		if o.Idle > 0 {
			fmt.Fprintf(o.Progress, "%s: %d idle pods\n", s.Name, o.Idle)
			if err := errors.Join(s.density(ctx, o.Idle), s.settle(ctx, false)); err != nil {
				return Report{}, fmt.Errorf("%s: %w", s.Name, err)
			}
		}
	}
	return newReport(all), nil
}
