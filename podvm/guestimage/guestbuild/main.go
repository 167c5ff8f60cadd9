// Command guestbuild builds a guest: guestbuild OUTPUT AGENT.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/caisson-vm/caisson/podvm/guestimage"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: guestbuild OUTPUT AGENT")
		os.Exit(2)
	}
	files, err := guestimage.Build(context.Background(), guestimage.BuildOptions{Output: os.Args[1], Agent: os.Args[2]})
	if err != nil {
		fmt.Fprintln(os.Stderr, "guestbuild:", err)
		os.Exit(1)
	}
	fmt.Println("guest", files.Version, "in", files.Dir)
}
