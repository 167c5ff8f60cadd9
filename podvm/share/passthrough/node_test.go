package passthrough

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestIdentity(t *testing.T) {
	of := func(kind uint16, mask uint32, born int64) unix.Statx_t {
		return unix.Statx_t{
			Ino: 7, Mnt_id: 3, Dev_minor: 5, Mode: kind | 0o600, Mask: mask,
			Btime: unix.StatxTimestamp{Sec: born, Nsec: uint32(born)},
		}
	}
	const known = unix.STATX_BTIME
	same := of(unix.S_IFREG, known, 1)
	same.Mode, same.Nlink, same.Mtime.Sec = unix.S_IFREG|0o777, 2, 9
	for what, c := range map[string]struct {
		a, b unix.Statx_t
		same bool
	}{
		"a change":                  {of(unix.S_IFREG, known, 1), same, true},
		"a number used again":       {of(unix.S_IFREG, known, 1), of(unix.S_IFREG, known, 2), false},
		"by another kind":           {of(unix.S_IFREG, 0, 0), of(unix.S_IFDIR, 0, 0), false},
		"a time that is not known":  {of(unix.S_IFREG, 0, 1), of(unix.S_IFREG, 0, 2), true},
		"a time that becomes known": {of(unix.S_IFREG, 0, 1), of(unix.S_IFREG, known, 1), false},
	} {
		if got := identify(&c.a) == identify(&c.b); got != c.same {
			t.Errorf("%s: the same is %v", what, got)
		}
	}
	f := serveDir(t, t.TempDir())
	var st, again unix.Statx_t
	n := must(f.nodes.get(1))(t)
	defer n.put()
	ok(t, statNode(n.fd, &st))
	ok(t, unix.Chmod(n.path(), 0o711))
	ok(t, statNode(n.fd, &again))
	if identify(&st) != n.ident || identify(&again) != n.ident {
		t.Errorf("the root is %+v, %+v and %+v", n.ident, identify(&st), identify(&again))
	}
}
