package guest

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/podvm/agent"
)

// correct adds to the wall clock.
func correct(add time.Duration) error {
	if add == 0 {
		return nil
	}
	t := correction(add)
	if _, err := unix.Adjtimex(&t); err != nil {
		return fmt.Errorf("correct the clock by %v: %w", add, err)
	}
	return nil
}

// correction has the kernel add to the wall clock gradually, half a millisecond a second, or at once from
// agent.ClockStep on.
// Source: adjtimex(2).
func correction(add time.Duration) unix.Timex {
	if add.Abs() < agent.ClockStep {
		return unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: add.Microseconds()}
	}
	t := unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO}
	ts := unix.NsecToTimespec(int64(add)) // its nanoseconds are never negative
	t.Time.Sec, t.Time.Usec = ts.Sec, ts.Nsec
	return t
}
