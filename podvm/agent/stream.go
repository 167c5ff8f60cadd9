// Package agent is how the host talks to the agent in a pod's VM: the RPCs of agent.proto, and
// byte streams. Its folder guest is the other end.
//
// Every stream that is dialled to vmm.AgentPort begins with a header: a length (4 bytes, big
// endian, at most HeaderMax) and a Header as JSON. The agent answers with a Reply in the same
// form, and from then on the stream carries what its kind says. Messages that are all zero have no
// bytes: so the stream that every pod's start waits for needs no JSON.
//
//	             ttrpc, service Agent; its header is all zero
//	exec         frames both ways, see FrameType; the process starts when the header arrives
//	attach       frames both ways, to and from a running container
//	output       Record frames from the guest (see Output), acknowledged by 8-byte big endian offsets
//	portforward  raw bytes to and from a TCP port on the guest's loopback, with half-close
//	share        a Link with FUSE messages: requests from the guest, replies from the host
//
// A frame is a type (1 byte), a length (4 bytes, big endian, at most FrameMax) and that many bytes.
package agent

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
)

// Limits, in bytes, that both ends hold each other to.
const (
	HeaderMax = 4 << 20
	FrameMax  = 64 << 10
)

// Kind says what a stream is for.
type Kind string

// The kinds of streams.
const (
	KindRPC         Kind = ""
	KindExec        Kind = "exec"
	KindAttach      Kind = "attach"
	KindOutput      Kind = "output"
	KindPortForward Kind = "portforward"
	KindShare       Kind = "share"
)

// Header opens a stream.
type Header struct {
	Kind      Kind   `json:"kind,omitempty"`
	Container string `json:"container,omitempty"`
	// Process is the OCI process of an exec (JSON); its user is already that of the container
	// unless set otherwise.
	Process json.RawMessage `json:"process,omitempty"`
	TTY     bool            `json:"tty,omitempty"`
	Stdin   bool            `json:"stdin,omitempty"`
	Stdout  bool            `json:"stdout,omitempty"`
	Stderr  bool            `json:"stderr,omitempty"`
	// Offset of the first byte of output wanted (KindOutput).
	Offset uint64 `json:"offset,omitempty"`
	// Port to forward to (KindPortForward).
	Port uint16 `json:"port,omitempty"`
	// Tag of the shared directory (KindShare).
	Tag string `json:"tag,omitempty"`
	// Session of the file system that serves it (KindShare). Another one than before knows nothing of what
	// the guest has open: what was mounted is dead then, and mounted anew for who comes.
	Session uint64 `json:"session,omitempty"`
	// Received is how many messages of the session's Link the host has received (KindShare).
	Received uint64 `json:"received,omitempty"`
}

// Reply answers a Header. Error is empty on success; Code is then unset, and otherwise the name
// of an errdefs kind: "not found", "failed precondition", "unavailable", "invalid argument", "internal".
type Reply struct {
	Error string `json:"error,omitempty"`
	Code  string `json:"code,omitempty"`
	// Received is how many messages of the session's Link the guest has received (KindShare).
	Received uint64 `json:"received,omitempty"`
}

// FrameType says what a frame of an exec or attach stream carries.
type FrameType byte

// The frame types. Stdin and Resize go to the guest, the others come from it. An empty Stdin,
// Stdout or Stderr frame is its end of file.
const (
	FrameStdin  FrameType = 1
	FrameStdout FrameType = 2
	FrameStderr FrameType = 3
	FrameResize FrameType = 4 // two big endian uint16: columns, rows
	FrameExit   FrameType = 5 // int32, big endian: the exit code; the last frame of an exec or attach
	FrameOutput FrameType = 6 // a Record, see AppendRecord; empty: the container has ended, that was all
)

// WriteMessage writes a Header or Reply in its framed form.
func WriteMessage(w io.Writer, v any) error {
	var body []byte
	if !reflect.ValueOf(v).IsZero() {
		var err error
		if body, err = json.Marshal(v); err != nil {
			return err
		}
	}
	if len(body) > HeaderMax {
		return fmt.Errorf("stream header of %d bytes is over the limit of %d", len(body), HeaderMax)
	}
	_, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	return err
}

// ReadMessage reads what WriteMessage wrote into a zero value. It reads no byte past the message.
func ReadMessage(r io.Reader, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > HeaderMax {
		return fmt.Errorf("stream header of %d bytes is over the limit of %d", n, HeaderMax)
	}
	if n == 0 {
		return nil
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return err
	}
	return json.Unmarshal(body, v)
}

// Record is one entry of a container's output: a line, or a part of one that is longer than
// LineMax or that ended without a newline. The agent makes records, stamps and numbers them, so
// that the log written from them is the same however often they are sent.
type Record struct {
	// Offset numbers records' bytes: that of the next record is Offset + RecordSize. Acknowledging an
	// offset frees everything before it.
	Offset uint64
	// Time is when its last byte was read, ns since 1970 by the guest's clock.
	Time int64
	// Stderr tells the stream.
	Stderr bool
	// Partial lines go on in the next record of the same stream.
	Partial bool
	// Line is without its newline; at most LineMax bytes.
	Line []byte
}

// LineMax is the longest line that is one record, in bytes: what containerd and the kubelet split at.
const LineMax = 16 << 10

const recordHead = 8 + 8 + 1

// RecordSize is what a record of n bytes of line adds to the offset.
func RecordSize(n int) uint64 { return uint64(n) + 1 }

// AppendRecord appends the record as the content of a FrameOutput.
func AppendRecord(b []byte, r Record) []byte {
	b = binary.BigEndian.AppendUint64(b, r.Offset)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Time))
	var flags byte
	if r.Stderr {
		flags |= 1
	}
	if r.Partial {
		flags |= 2
	}
	return append(append(b, flags), r.Line...)
}

// ParseRecord reads what AppendRecord wrote; Line points into b.
func ParseRecord(b []byte) (Record, error) {
	if len(b) < recordHead || len(b) > recordHead+LineMax || b[16]&^3 != 0 {
		return Record{}, fmt.Errorf("malformed output record of %d bytes", len(b))
	}
	return Record{
		Offset:  binary.BigEndian.Uint64(b),
		Time:    int64(binary.BigEndian.Uint64(b[8:])),
		Stderr:  b[16]&1 != 0,
		Partial: b[16]&2 != 0,
		Line:    b[recordHead:],
	}, nil
}
