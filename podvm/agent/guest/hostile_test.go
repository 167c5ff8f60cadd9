package guest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// hostile are containers that may do much, and try to reach the agent.
func (m *machine) hostile(t *testing.T) {
	caps := []string{"CAP_SYS_PTRACE", "CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN"}
	may := func(script string) *specs.Spec {
		s := vmSpec("sh", "-c", script)
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
		return s
	}
	signals := "for s in HUP INT QUIT ILL TRAP ABRT BUS FPE SEGV TERM STKFLT SYS USR1 ALRM KILL STOP; do kill -$s 1; done; sleep 1"
	see := "ls -A /proc/1/root/ /proc/1/root/../../; grep Cap... /proc/1/status"
	shared := m.container("hostile-shared", may(see+";"+signals+"; echo lives"), &agent.CreateRequest{SharePid: true})
	if s := shared.wait(); s.ExitCode != 0 {
		t.Errorf("it ended with %v", s)
	}
	out, errs := shared.logs()
	want := fmt.Sprintf("/proc/1/root/:\n\n/proc/1/root/../../:\nCapInh:\t%s\nCapPrm:\t%[1]s\nCapEff:\t%[1]s\n", strings.Repeat("0", 16))
	if !strings.HasPrefix(out, want) || !strings.HasSuffix(out, "lives\n") {
		t.Errorf("the first process of a shared namespace shows %q, %q; want %q", out, errs, want)
	}
	spec := may(signals + "; echo lives; cat /sys/fs/cgroup/pod/pids.max")
	spec.Linux.Namespaces = spec.Linux.Namespaces[:2] // the guest's cgroups
	node := m.container("hostile-node", spec, &agent.CreateRequest{GuestPid: true})
	if s := node.wait(); s.ExitCode != 0 {
		t.Errorf("it ended with %v", s)
	}
	if out, errs := node.logs(); out != fmt.Sprintf("lives\n%d\n", podTasks) {
		t.Errorf("after signals to the agent: %q, %q", out, errs)
	}
	// What the agent has is not inherited: its files, and that it is the last to be killed.
	const inherited = "echo /proc/self/fd/*; cat /proc/self/oom_score_adj; echo -1 >/proc/self/oom_score_adj || echo refused"
	const had = "/proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2 /proc/self/fd/3\n0\nrefused\n"
	plain := m.container("hostile-plain", vmSpec("sh", "-c", inherited+"; exec sleep 1000"), &agent.CreateRequest{})
	if _, out, errs := plain.exec(nil, "sh", "-c", inherited); out != had {
		t.Errorf("an exec has %q, %q; want %q", out, errs, had)
	}
	if _, err := service1(t, m.ctx, m.c).Signal(m.ctx, &agent.SignalRequest{Id: plain.id, Signal: 9}); err != nil {
		t.Fatal(err)
	}
	plain.wait()
	if out, errs := plain.logs(); out != had {
		t.Errorf("a container has %q, %q; want %q", out, errs, had)
	}
	plain.remove()
	shared.remove()
	node.remove()
}
