// Package e2e proves Caisson from outside: real VMs, driven through the CRI socket by crictl and by
// the CRI's own client, with images from a real registry.
package e2e

import (
	"testing"

	"github.com/caisson-vm/caisson/e2e/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// TestPods runs on one daemon all that needs none of its own, and ends with the leak check.
func TestPods(t *testing.T) {
	d := harness.Start(t)
	for _, s := range []struct {
		name string
		run  func(*testing.T, *harness.Daemon)
	}{
		{"Crictl", testCrictl},
		{"Exec", testExec},
		{"Terminal", testTerminal},
		{"Logs", testLogs},
		{"Attach", testAttach},
		{"PortForward", testPortForward},
		{"Network", testNetwork},
		{"HostPort", testHostPort},
		{"SharedPod", testSharedPod},
		{"Privileged", testPrivileged},
		{"InitContainers", testInitContainers},
		{"Exits", testExits},
		{"Grace", testGrace},
		{"TerminationMessage", testTerminationMessage},
		{"Volumes", testVolumes},
		{"ImageVolumes", testImageVolumes},
		{"HostDirectory", testHostDirectory},
		{"HostDirectoryRefused", testHostDirectoryRefused},
		{"Resources", testResources},
		{"Size", testSize},
		{"FreedMemory", testFreedMemory},
		{"Stats", testStats},
		{"Idempotence", testIdempotence},
		{"Filters", testFilters},
		{"Events", testEvents},
		{"Images", testImages},
		{"TortureImage", testTortureImage},
		{"BadNames", testBadNames},
		{"BadExec", testBadExec},
		{"GuestPanic", testGuestPanic},
		{"AgentDies", testAgentDies},
		{"Identity", testIdentity},
	} {
		t.Run(s.name, func(t *testing.T) { s.run(t, d.On(t)) })
	}
}
