package guest

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strings"
	"unsafe"

	"github.com/caisson-vm/caisson/podvm/agent"
	"golang.org/x/sys/unix"
)

// nameFiles are by what containers see who they are.
var nameFiles = []string{"hostname", "resolv.conf", "boot_id", "machine-id"}

// names has the files of nameFiles open, which a clone has from its template.
type names struct {
	files map[string]*os.File
	used  bool
}

// openNames makes the files, empty.
func (a *Agent) openNames() (*names, error) {
	n := &names{files: map[string]*os.File{}}
	for _, name := range nameFiles {
		f, err := os.OpenFile(a.path(name), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
		if err != nil {
			return nil, err
		}
		n.files[name] = f
	}
	return n, nil
}

func (n *names) write(content map[string]string) error {
	if err := n.clear(); err != nil {
		return err
	}
	n.used = true
	for name, s := range content {
		if _, err := n.files[name].WriteAt([]byte(s), 0); err != nil {
			return err
		}
	}
	return nil
}

// clear empties the files.
func (n *names) clear() error {
	if !n.used {
		return nil
	}
	for _, f := range n.files {
		if err := f.Truncate(0); err != nil {
			return err
		}
	}
	n.used = false
	return nil
}

// entropy is the kernel's random pool, /dev/urandom. A clone has it open from its template.
type entropy struct{ *os.File }

func openEntropy() (entropy, error) {
	f, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if err != nil {
		return entropy{}, fmt.Errorf("open the kernel's random pool: %w", err)
	}
	return entropy{f}, nil
}

// credit mixes bytes into the pool, counts them, and makes the kernel use them at once.
// Source: random(4).
func (e entropy) credit(bytes []byte) error {
	if len(bytes) == 0 {
		return nil
	}
	// struct rand_pool_info: the count in bits, the size in bytes, the bytes.
	info := binary.NativeEndian.AppendUint32(nil, uint32(len(bytes)*8))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(bytes)))
	info = append(info, bytes...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, e.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return errno
	}
	return unix.IoctlSetInt(int(e.Fd()), unix.RNDRESEEDCRNG, 0)
}

// bootID is a random UUID in the form of the kernel's.
func (e entropy) bootID() (string, error) {
	var b [16]byte
	if _, err := io.ReadFull(e, b[:]); err != nil {
		return "", fmt.Errorf("read the kernel's random pool: %w", err)
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), nil
}

// identity sets names and writes the files that containers see them by; it returns the boot id.
func (a *Agent) identity(req *agent.SetupRequest) (bootID string, err error) {
	if req.Hostname != "" {
		if err := unix.Sethostname([]byte(req.Hostname)); err != nil {
			return "", fmt.Errorf("set the host name %q: %w", req.Hostname, err)
		}
	}
	if bootID, err = a.entropy.bootID(); err != nil {
		return "", err
	}
	return bootID, a.names.write(map[string]string{
		"hostname": req.Hostname + "\n", "resolv.conf": resolvConf(req.Dns), "boot_id": bootID + "\n",
		"machine-id": req.MachineId + "\n",
	})
}

func resolvConf(dns *agent.DNS) string {
	var b strings.Builder
	for _, server := range dns.GetServers() {
		fmt.Fprintf(&b, "nameserver %s\n", server)
	}
	if s := dns.GetSearches(); len(s) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(s, " "))
	}
	if o := dns.GetOptions(); len(o) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(o, " "))
	}
	return b.String()
}
