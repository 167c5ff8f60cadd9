package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/e2e/images"
	"github.com/caisson-vm/caisson/e2e/registry"
)

func socket() string  { return filepath.Join(folder, "caisson.sock") }
func pidPath() string { return filepath.Join(folder, "caissond.pid") }
func logPath() string { return filepath.Join(folder, "caissond.log") }

// conflist is the pods' network: a bridge of the demo's namespace.
const conflist = `{
  "cniVersion": "1.0.0", "name": "demo",
  "plugins": [
    {"type": "bridge", "bridge": "caisson0", "isGateway": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77:ca15:50::/64"}]],
              "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`

// startRegistry serves the images that the project assembles, as docker.io.
func startRegistry(ctx context.Context) (*registry.Registry, error) {
	all, err := images.Read("build/images")
	if err != nil {
		return nil, err
	}
	r, err := registry.Start(registry.Options{})
	if err != nil {
		return nil, err
	}
	var shown []images.Image
	for _, i := range all {
		if i.Refs[0] == images.Nginx || i.Refs[0] == images.Busybox {
			shown = append(shown, i)
		}
	}
	if err := r.Load(ctx, shown); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// writeConfig writes the daemon's configuration and returns its path.
func writeConfig(r *registry.Registry) (string, error) {
	files, err := registry.WriteConfig(folder, map[string]string{"docker.io": r.Addr()})
	if err != nil {
		return "", err
	}
	cni := filepath.Join(folder, "cni")
	guest, err := filepath.Abs("build/guest")
	if err != nil {
		return "", err
	}
	config := fmt.Sprintf("listen = %q\nroot = %q\nstate = %q\nguest = %q\n[cni]\nconf_dir = %q\n[images]\nregistries_conf = %q\npolicy = %q\n",
		socket(), filepath.Join(folder, "root"), filepath.Join(folder, "run"), guest, cni, files.RegistriesConf, files.Policy)
	path := filepath.Join(folder, "config.toml")
	return path, errors.Join(
		os.Mkdir(cni, 0o755),
		os.WriteFile(filepath.Join(cni, "10-demo.conflist"), fmt.Appendf(nil, conflist, filepath.Join(folder, "ipam")), 0o644),
		os.WriteFile(path, []byte(config), 0o644))
}

// startLimit bounds the daemon's start, which may try KVM by booting a guest.
const startLimit = 3 * time.Minute

// startDaemon runs caissond and waits until it says that it is ready.
func startDaemon(ctx context.Context, config string) error {
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(folder, "notify"), Net: "unixgram"})
	if err != nil {
		return err
	}
	defer notify.Close()
	log, err := os.Create(logPath())
	if err != nil {
		return err
	}
	defer log.Close()
	daemon := exec.Command("bin/caissond", "serve", "--config", config)
	daemon.Stdout, daemon.Stderr = log, log
	daemon.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify.LocalAddr().String())
	daemon.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := daemon.Start(); err != nil {
		return err
	}
	if err := os.WriteFile(pidPath(), []byte(strconv.Itoa(daemon.Process.Pid)), 0o644); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	go func() {
		daemon.Wait()
		cancel()
	}()
	defer context.AfterFunc(ctx, func() { notify.Close() })()
	for b := make([]byte, 4096); ; {
		n, err := notify.Read(b)
		if err != nil {
			text, _ := os.ReadFile(logPath())
			return fmt.Errorf("the daemon is not ready; its log:\n%s", text)
		}
		if bytes.Contains(b[:n], []byte("READY=1")) {
			return nil
		}
	}
}

// endDaemon asks the daemon to end and waits for it.
func endDaemon(ctx context.Context) error {
	text, err := os.ReadFile(pidPath())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err != nil || strings.TrimSpace(string(comm)) != "caissond" {
		return nil // the number is another process's by now
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil {
		return err
	}
	const limit = 20_000 // ms
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, limit); n == 0 || err != nil {
		return fmt.Errorf("the daemon, process %d, does not end: %w", pid, err)
	}
	return nil
}
