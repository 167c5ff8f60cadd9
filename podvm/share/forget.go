package share

import (
	"encoding/binary"
	"time"

	"github.com/caisson-vm/caisson/podvm/share/passthrough"
)

// forgetEvery is how often a guest is made to forget. Who unmounts on the node tries again after as long.
const forgetEvery = 2 * time.Second

// notifyInvalEntry is FUSE_NOTIFY_INVAL_ENTRY of linux/fuse.h.
const notifyInvalEntry = 3

// forget has the guest forget other file systems that are mounted below the directory, for as long as the
// process lives: each inode that a guest knows is a descriptor here, and what has one can't be unmounted on
// the node, which follows into this mount namespace.
func (s *session) forget() {
	for range time.Tick(forgetEvery) {
		if !s.link.Connected() {
			continue
		}
		for _, c := range s.fs.Crossings() {
			if s.link.Send(invalEntry(c)) != nil {
				return
			}
		}
	}
}

// invalEntry is a message that tells the guest's kernel to drop a name, and what it keeps below.
func invalEntry(c passthrough.Crossing) []byte {
	m := make([]byte, outHeader, outHeader+16+len(c.Name)+1)
	binary.LittleEndian.PutUint32(m[4:], notifyInvalEntry)
	m = binary.LittleEndian.AppendUint64(m, c.Parent) // fuse_notify_inval_entry_out: parent, namelen, flags
	m = binary.LittleEndian.AppendUint32(m, uint32(len(c.Name)))
	m = binary.LittleEndian.AppendUint32(m, 0)
	m = append(append(m, c.Name...), 0)
	binary.LittleEndian.PutUint32(m, uint32(len(m)))
	return m
}
