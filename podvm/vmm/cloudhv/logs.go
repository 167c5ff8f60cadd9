package cloudhv

import (
	"errors"
	"fmt"
	"strings"

	"github.com/caisson-vm/caisson/podvm/vmm/tail"
)

// logs are the guest's console and the VMM's own words.
type logs struct{ console, vmm *tail.Log }

func openLogs(dir string) (logs, error) {
	console, err := tail.Open(consolePath(dir))
	if err != nil {
		return logs{}, err
	}
	vmm, err := tail.Open(logPath(dir))
	if err != nil {
		console.Close()
		return logs{}, err
	}
	return logs{console, vmm}, nil
}

func (l logs) close() error { return errors.Join(l.console.Close(), l.vmm.Close()) }

// String is the end of both, to be appended to an error.
func (l logs) String() string { return words(l.console.String(), l.vmm.String()) }

// lastWords is the same of a VM that nobody watched at its end.
func lastWords(dir string) string {
	return words(tail.Read(consolePath(dir)), tail.Read(logPath(dir)))
}

func words(console, vmm string) string {
	var b strings.Builder
	if console != "" {
		fmt.Fprintf(&b, "; the guest's console ends: %s", console)
	}
	if vmm != "" {
		fmt.Fprintf(&b, "; the VMM's log ends: %s", vmm)
	}
	return b.String()
}
