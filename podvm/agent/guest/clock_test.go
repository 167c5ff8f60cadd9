package guest

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCorrection: little is corrected gradually, in microseconds, and what is more at once.
func TestCorrection(t *testing.T) {
	for _, add := range []time.Duration{499 * time.Millisecond, -499 * time.Millisecond} {
		if c := correction(add); c.Modes != unix.ADJ_OFFSET_SINGLESHOT || c.Offset != add.Microseconds() {
			t.Errorf("%v: %+v", add, c)
		}
	}
	for _, add := range []time.Duration{500 * time.Millisecond, -500 * time.Millisecond, -2*time.Hour - 1} {
		c := correction(add)
		if c.Modes != unix.ADJ_SETOFFSET|unix.ADJ_NANO || c.Time.Usec < 0 || c.Time.Usec >= int64(time.Second) || c.Time.Sec*int64(time.Second)+c.Time.Usec != int64(add) {
			t.Errorf("%v: %+v", add, c)
		}
	}
}
