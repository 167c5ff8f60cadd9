package guest

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"github.com/caisson-vm/caisson/podvm/agent"
	"golang.org/x/sys/unix"
)

// nameFiles are by what containers see who they are.
var nameFiles = []string{"hostname", "resolv.conf", "machine-id"}

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

// bootID reads the guest's boot_id. The kernel makes it when it is first read, and so not in a template, whose
// clones would all have the same; and not by a file that is mounted over it: in a container whose /proc is covered
// anywhere nobody can mount another one, as rootless containers in a privileged one do.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// identity sets names and writes the files that containers see them by.
func (a *Agent) identity(req *agent.SetupRequest) error {
	if req.Hostname != "" {
		if err := unix.Sethostname([]byte(req.Hostname)); err != nil {
			return fmt.Errorf("set the host name %q: %w", req.Hostname, err)
		}
	}
	return a.names.write(map[string]string{
		"hostname": req.Hostname + "\n", "resolv.conf": resolvConf(req.Dns), "machine-id": req.MachineId + "\n",
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
