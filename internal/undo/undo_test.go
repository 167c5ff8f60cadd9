package undo

import (
	"context"
	"errors"
	"slices"
	"testing"
)

func TestRunGoesBackwardsPastErrors(t *testing.T) {
	var got []string
	var s Stack
	for _, name := range []string{"netns", "tap", "vm"} {
		s.Push(name, func(ctx context.Context) error {
			if _, ok := ctx.Deadline(); !ok {
				t.Errorf("%s: no deadline", name)
			}
			got = append(got, name)
			return errors.New("stuck")
		})
	}
	s.Run()
	if want := []string{"vm", "tap", "netns"}; !slices.Equal(got, want) {
		t.Fatalf("ran %v, want %v", got, want)
	}
	s.Run()
	if len(got) != 3 {
		t.Fatalf("a second Run ran steps again: %v", got)
	}
}

func TestReleaseKeepsWhatWasDone(t *testing.T) {
	var s Stack
	s.Push("vm", func(context.Context) error { t.Error("undone after Release"); return nil })
	s.Release()
	s.Run()
}
