package kubelet

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// testClock sets the node's clock forward, and back: the pod's follows.
func (m *machine) testClock(t *testing.T) {
	m.await(t, "the pod is ready", "pair", ready)
	for _, step := range []time.Duration{3 * time.Hour, -3 * time.Hour} {
		ts := unix.NsecToTimespec(time.Now().Add(step).UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
			t.Fatal(err)
		}
		eventually(t, fmt.Sprintf("the pod's clock has the node's step of %v", step), func() error {
			out, err := m.run("pair", "worker", "date +%s")
			if err != nil {
				return err
			}
			seconds, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
			if away := time.Since(time.Unix(seconds, 0)); err != nil || away.Abs() > 20*time.Second { // an exec takes its time
				return fmt.Errorf("it is %v behind, %v", away, err)
			}
			return nil
		})
	}
}
