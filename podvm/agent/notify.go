package agent

import "encoding/binary"

// notifyDropNames is a notification for the agent: those of the FUSE protocol have small codes.
const notifyDropNames = 1 << 16

// outHeader is the size of struct fuse_out_header of linux/fuse.h: length, error or a notification's code,
// and the number of the request, which a notification has not.
const outHeader = 16

// DropNames is a message of the host over a directory's link. It has the guest's kernel forget all of that
// directory that nobody uses.
func DropNames() []byte {
	m := make([]byte, outHeader)
	binary.LittleEndian.PutUint32(m, outHeader)
	binary.LittleEndian.PutUint32(m[4:], notifyDropNames)
	return m
}

// IsDropNames tells whether a message is DropNames.
func IsDropNames(m []byte) bool {
	return IsNotification(m) && binary.LittleEndian.Uint32(m[4:]) == notifyDropNames
}

// IsNotification tells whether a message of the host is no reply.
func IsNotification(m []byte) bool {
	return len(m) >= outHeader && binary.LittleEndian.Uint64(m[8:]) == 0
}
