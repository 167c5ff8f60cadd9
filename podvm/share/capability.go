package share

import (
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// setCapabilities sets what all threads of the process are permitted, and have in effect.
func setCapabilities(set uint64) error {
	head := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		part := uint32(set >> (32 * i))
		data[i] = unix.CapUserData{Effective: part, Permitted: part}
	}
	_, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(head)), uintptr(unsafe.Pointer(&data[0])), 0)
	runtime.KeepAlive(head)
	if e != 0 {
		return fmt.Errorf("capset: %w", e)
	}
	return nil
}
