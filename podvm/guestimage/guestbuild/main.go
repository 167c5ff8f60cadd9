// Command guestbuild builds a guest: guestbuild OUTPUT AGENT [KERNEL].
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/caisson-vm/caisson/podvm/guestimage"
)

func main() {
	if len(os.Args) < 3 || len(os.Args) > 4 {
		fmt.Fprintln(os.Stderr, "usage: guestbuild OUTPUT AGENT [KERNEL]")
		os.Exit(2)
	}
	o := guestimage.BuildOptions{Output: os.Args[1], Agent: os.Args[2]}
	if len(os.Args) == 4 {
		o.Kernel = os.Args[3]
	}
	files, err := guestimage.Build(context.Background(), o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "guestbuild:", err)
		os.Exit(1)
	}
	fmt.Println("guest", files.Version, "in", files.Dir)
}
