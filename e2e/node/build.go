package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// basePackages are what a Kubernetes node with our runtime needs.
const basePackages = "systemd-sysv,udev,dbus,openssh-server,iproute2,iptables,nftables,kmod,procps,curl,jq,socat,conntrack," +
	"ca-certificates,e2fsprogs,qemu-system-x86,linux-image-cloud-amd64,containernetworking-plugins,crun,prometheus"

// files are what makes the root file system a node.
var files = map[string]string{
	"etc/hostname":                         "node\n",
	"etc/hosts":                            "127.0.0.1 localhost node\n",
	"etc/fstab":                            "/dev/vda / ext4 rw,noatime 0 1\n",
	"etc/systemd/network/10-node.network":  "[Match]\nName=e*\n[Network]\nDHCP=yes\n",
	"etc/modules-load.d/node.conf":         "kvm_amd\ntun\noverlay\nbr_netfilter\n",
	"etc/sysctl.d/node.conf":               "net.ipv4.ip_forward=1\nnet.ipv6.conf.all.forwarding=1\n",
	"etc/systemd/system.conf.d/limit.conf": "[Manager]\nDefaultTimeoutStopSec=10s\n",
}

// build makes the disk anew from Debian's packages.
func (n *node) build(ctx context.Context) error {
	mirror, err := debianMirror()
	if err != nil {
		return err
	}
	root := n.path("root")
	if err := errors.Join(os.RemoveAll(root), os.MkdirAll(n.dir, 0o700)); err != nil {
		return err
	}
	defer os.RemoveAll(root)
	packages := basePackages
	if n.packages != "" {
		packages += "," + n.packages
	}
	fmt.Println("node: installing Debian into", root)
	if err := command(ctx, "debootstrap", "--variant=minbase", "--include="+packages, "bookworm", root, mirror); err != nil {
		return err
	}
	if err := n.configure(ctx, root); err != nil {
		return err
	}
	return n.makeDisk(ctx, root)
}

func (n *node) configure(ctx context.Context, root string) error {
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			return err
		}
	}
	if _, err := os.Stat(n.path("key")); err != nil {
		if err := command(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", n.path("key")); err != nil {
			return err
		}
	}
	if err := command(ctx, "install", "-D", "-m600", n.path("key.pub"), filepath.Join(root, "root/.ssh/authorized_keys")); err != nil {
		return err
	}
	if err := command(ctx, "chroot", root, "systemctl", "-q", "enable", "systemd-networkd", "ssh"); err != nil {
		return err
	}
	return command(ctx, "chroot", root, "systemctl", "-q", "mask", "apt-daily.timer", "apt-daily-upgrade.timer",
		"e2scrub_reap.service", "getty@tty1.service", "prometheus.service", "prometheus-node-exporter.service")
}

func (n *node) makeDisk(ctx context.Context, root string) error {
	for from, to := range map[string]string{"boot/vmlinuz-*": "vmlinuz", "boot/initrd.img-*": "initrd"} {
		found, err := filepath.Glob(filepath.Join(root, from))
		if err != nil || len(found) != 1 {
			return fmt.Errorf("%s: found %v, want one", from, found)
		}
		if err := command(ctx, "cp", found[0], n.path(to)); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(n.path("disk")); err != nil {
		return err
	}
	if err := command(ctx, "truncate", "-s", n.diskSize, n.path("disk.new")); err != nil {
		return err
	}
	if err := command(ctx, "mkfs.ext4", "-q", "-F", "-d", root, n.path("disk.new")); err != nil {
		return err
	}
	return os.Rename(n.path("disk.new"), n.path("disk"))
}

// debianMirror is where this machine's own packages come from.
func debianMirror() (string, error) {
	sources, err := filepath.Glob("/etc/apt/sources.list.d/*.sources")
	if err != nil {
		return "", err
	}
	for _, path := range append(sources, "/etc/apt/sources.list") {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			fields := strings.Fields(lines.Text())
			if len(fields) >= 2 && (fields[0] == "URIs:" || fields[0] == "deb" && !strings.HasPrefix(fields[1], "[")) {
				return fields[1], nil
			}
		}
	}
	return "", errors.New("no Debian mirror in /etc/apt: the node is made of this machine's Debian packages")
}

// command runs a program; its output is in the error.
func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, tail(string(out), 2000))
	}
	return nil
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }
