package passthrough

import (
	"bytes"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSocketIsTold: why a socket of the host's refuses is logged once, and never of the guest's own.
func TestSocketIsTold(t *testing.T) {
	before := slog.Default()
	defer slog.SetDefault(before)
	for name, c := range map[string]struct {
		own  bool
		want int
	}{"the host's": {false, 1}, "the guest's": {true, 0}} {
		var log bytes.Buffer
		slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
		mnt, host := mounted(t)
		if c.own {
			ok(t, unix.Mknod(mnt+"/a", unix.S_IFSOCK|0o600, 0))
		} else {
			l := must(net.Listen("unix", host+"/a"))(t)
			defer l.Close()
		}
		ok(t, os.Link(host+"/a", host+"/b"))
		ok(t, os.WriteFile(host+"/file", nil, 0o600))
		for _, entry := range []string{"file", "a", "b"} {
			lstat(t, mnt+"/"+entry)
		}
		if got := strings.Count(log.String(), "socket"); got != c.want {
			t.Errorf("%s: %d lines:\n%s", name, got, &log)
		}
	}
}
