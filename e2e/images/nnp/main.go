// Command nnp prints its effective user: installed setuid root it tells whether the kernel let it
// gain privileges. It is the program of the image that critest uses for no_new_privs.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Printf("Effective uid: %d\n", os.Geteuid())
}
