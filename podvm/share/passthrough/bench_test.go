package passthrough

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	block = 1 << 20
	// blocks are how many a file has.
	blocks = 64
)

// BenchmarkRead reads blocks of 1 MiB, which are in the host's cache and not the guest's.
func BenchmarkRead(b *testing.B) {
	mnt, host := mounted(b)
	ok(b, os.WriteFile(host+"/file", make([]byte, blocks*block), 0o600))
	buf := make([]byte, block)
	b.SetBytes(block)
	var f *os.File
	for i := 0; b.Loop(); i++ {
		if i%blocks == 0 { // an open drops the cache
			f.Close()
			f = must(os.Open(mnt + "/file"))(b)
		}
		must(f.ReadAt(buf, int64(i%blocks*block)))(b)
	}
	f.Close()
}

// BenchmarkWrite writes blocks of 1 MiB to the host's cache.
func BenchmarkWrite(b *testing.B) {
	mnt, _ := mounted(b)
	f := must(os.Create(mnt + "/file"))(b)
	defer f.Close()
	buf := make([]byte, block)
	b.SetBytes(block)
	for i := 0; b.Loop(); i++ {
		must(f.WriteAt(buf, int64(i%blocks*block)))(b)
	}
}

func BenchmarkCreateUnlink(b *testing.B) {
	for name, uid := range map[string]uint32{"root": 0, "user": 1000} {
		b.Run(name, func(b *testing.B) {
			mnt, host := mounted(b)
			ok(b, os.Chmod(host, 0o777))
			run := func() error {
				for b.Loop() {
					fd, err := unix.Open(mnt+"/file", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600)
					if err != nil {
						return err
					}
					unix.Close(fd)
					if err := unix.Unlink(mnt + "/file"); err != nil {
						return err
					}
				}
				return nil
			}
			if uid == 0 {
				ok(b, run())
			} else {
				ok(b, asUser(uid, uid, run))
			}
		})
	}
}
