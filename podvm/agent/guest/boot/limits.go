package boot

import (
	"errors"
	"fmt"
	"os"
	"path"
	"syscall"

	"golang.org/x/sys/unix"
)

// settings keep an idle guest from waking up for housekeeping, are what a node has that was set up
// for Kubernetes (the kubelet's --protect-kernel-defaults, and systemd's), and lift limits that the
// kernel derives from the memory it boots with, which here is a fraction of what the pod may get.
var settings = map[string]string{
	"kernel/panic":                 "-1",
	"kernel/panic_on_oops":         "1",
	"kernel/modprobe":              modprobePath,
	"kernel/pid_max":               "4194304",
	"kernel/threads-max":           "1048576",
	"kernel/keys/root_maxbytes":    "25000000",
	"kernel/keys/root_maxkeys":     "1000000",
	"vm/compaction_proactiveness":  "0",
	"vm/stat_interval":             "10",
	"vm/overcommit_memory":         "1",
	"vm/panic_on_oom":              "0",
	"fs/file-max":                  "9223372036854775807",
	"fs/inotify/max_user_watches":  "1048576",
	"fs/epoll/max_user_watches":    "4194304",
	"net/ipv4/tcp_rmem":            "4096 131072 6291456",
	"net/ipv4/tcp_wmem":            "4096 16384 4194304",
	"net/ipv4/tcp_max_orphans":     "65536",
	"net/ipv4/tcp_max_tw_buckets":  "65536",
	"net/ipv4/tcp_max_syn_backlog": "4096",
	"user/max_user_namespaces":     "524288",
	"user/max_mnt_namespaces":      "524288",
	"user/max_net_namespaces":      "524288",
	"user/max_pid_namespaces":      "524288",
	"user/max_ipc_namespaces":      "524288",
	"user/max_uts_namespaces":      "524288",
	"user/max_cgroup_namespaces":   "524288",
	"user/max_time_namespaces":     "524288",

	// As on a node for Kubernetes, whose network namespaces begin with what it has, and as distributions have it.
	"net/ipv4/ip_forward": "1",
	"vm/max_map_count":    "1048576",

	// Whoever is not root may listen on every port, and ping, as with containerd. The pod's own sysctls come after.
	"net/ipv4/ip_unprivileged_port_start": "0",
	"net/ipv4/ping_group_range":           "0 2147483647",
}

func limits() error {
	for name, value := range settings {
		if err := write(path.Join("/proc/sys", name), value); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := connections(); err != nil {
		return err
	}
	if err := write("/proc/self/oom_score_adj", "-1000"); err != nil {
		return err
	}
	const infinity = ^uint64(0)
	for resource, limit := range map[int]uint64{
		unix.RLIMIT_NOFILE: 1 << 20, unix.RLIMIT_NPROC: infinity, unix.RLIMIT_SIGPENDING: infinity,
	} {
		// Package syscall knows that the limit was set, and leaves it to child processes.
		if err := syscall.Setrlimit(resource, &syscall.Rlimit{Cur: limit, Max: limit}); err != nil {
			return fmt.Errorf("set resource limit %d: %w", resource, err)
		}
	}
	return nil
}

// connectionsMax is there when the kernel tracks connections.
const connectionsMax = "/proc/sys/net/netfilter/nf_conntrack_max"

// connections lets pods track as many connections as a node with kube-proxy, where the kernel tracks them: by the
// memory that it boots with it would be 4096. One takes memory when it is used.
func connections() error {
	for path, value := range map[string]string{
		connectionsMax: "262144",
		"/sys/module/nf_conntrack/parameters/hashsize": "65536",
	} {
		if err := write(path, value); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// scale sets the limits on the memory of sockets, in pages, by the memory that the guest now has:
// the kernel sets them once, by the memory it boots with.
// Source: tcp_init_mem and udp_init of the Linux kernel.
func scale() error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("read the size of memory: %w", err)
	}
	pages := info.Totalram * uint64(info.Unit) / uint64(os.Getpagesize())
	triple := func(limit uint64) string { return fmt.Sprintln(limit/4*3, limit, limit/2*3) }
	if err := write("/proc/sys/net/ipv4/tcp_mem", triple(pages/16)); err != nil {
		return err
	}
	return write("/proc/sys/net/ipv4/udp_mem", triple(pages/8))
}
