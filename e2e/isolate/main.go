// Command isolate runs a test program in PID, mount, network and IPC namespaces of its own, and fails if
// it leaves anything there or on the machine: go test -exec isolate. It needs root; without, it says so
// and only runs the program.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/caisson-vm/caisson/e2e/harness"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "isolate PROGRAM [ARG...]")
		os.Exit(2)
	}
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "isolate: not root: what the tests leave behind is not looked for")
		os.Exit(run())
	}
	os.Exit(harness.Isolate(func() error { return nil }, checked))
}

// checked runs the program and looks for what it has left.
func checked() int {
	before, err := harness.Look()
	if err != nil {
		return fail(err)
	}
	code := run()
	left, err := leftSince(before)
	if err != nil {
		return fail(err)
	}
	for _, line := range left {
		code = max(code, fail(errors.New("left behind: "+line)))
	}
	return code
}

// endLimit is how long what ends because the program has ended may take for it: a process whose pipe from
// the program is closed by now.
const endLimit = 5 * time.Second

// leftSince is what is there and was not before, also after a while.
func leftSince(before harness.Snapshot) ([]string, error) {
	for end := time.Now().Add(endLimit); ; time.Sleep(20 * time.Millisecond) {
		now, err := harness.Look()
		if err != nil {
			return nil, err
		}
		left := slices.DeleteFunc(now.Since(before), func(line string) bool {
			return strings.HasSuffix(line, harness.NotWaitedFor) // its parent was the program, and now it is whoever waits for orphans
		})
		if len(left) == 0 || time.Now().After(end) {
			return left, nil
		}
	}
}

func run() int {
	cmd := exec.Command(os.Args[1], os.Args[2:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode()
	}
	if err != nil {
		return fail(err)
	}
	return 0
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, "isolate:", err)
	return 1
}
