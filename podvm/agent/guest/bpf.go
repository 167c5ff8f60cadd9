package guest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// keepPack has the kernel keep the memory that it puts compiled BPF programs in, as long as the file is
// open. It takes and fills 2 MiB for the first of them, which crun loads for a container's devices, and
// gives them back after the last: a clone whose template holds one has them from there.
// Source: bpf_prog_pack of Linux.
func keepPack() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket for a BPF program: %w", err)
	}
	f := os.NewFile(uintptr(fd), "bpf")
	accept := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 1<<32 - 1}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &accept}); err != nil {
		f.Close()
		return nil, fmt.Errorf("load a BPF program: %w", err)
	}
	return f, nil
}
