// Command caisson-agent is PID 1 in a pod's VM: it sets the guest up and runs the pod's containers
// on behalf of the host. The kernel also runs it as modprobe.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/caisson-vm/caisson/podvm/agent/guest"
	"github.com/caisson-vm/caisson/podvm/agent/guest/boot"
)

// version is set by the linker.
var version = "dev"

func main() {
	if filepath.Base(os.Args[0]) == "modprobe" {
		os.Exit(boot.Modprobe(os.Args[1:]))
	}
	if len(os.Args) == 2 && os.Args[1] == guest.PauseArg {
		guest.Pause()
	}
	if os.Getpid() != 1 {
		fmt.Println("caisson-agent", version, "is started by the kernel of a pod's VM")
		os.Exit(2)
	}
	boot.Fatal(run(context.Background()))
}

// run serves the pod as long as the VM lives; it returns only when that is impossible.
func run(ctx context.Context) error {
	g, err := boot.Init()
	if err != nil {
		return err
	}
	a, err := guest.New(guest.Options{Version: version, Template: boot.LeaveBalloon})
	if err != nil {
		return err
	}
	if err := g.Serve(ctx, a.Serve); err != nil {
		return err
	}
	return errors.New("all channels to the host were closed")
}
