package guest

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// withstand makes this process live through signals that others send to end it. A container that
// sees it, in a PID namespace that they share, would end the pod by them. They are caught, not
// ignored, because what is ignored stays so in the programs that are run.
func withstand() {
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGABRT,
		unix.SIGILL, unix.SIGTRAP, unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGSTKFLT, unix.SIGSYS)
}
