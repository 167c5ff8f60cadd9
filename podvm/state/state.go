// Package state keeps records as files: written atomically and durably, versioned, and locked
// against a second daemon.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/caisson-vm/caisson/internal/atomicfile"
)

// version of the records. A record of another version is not understood, and kept.
//
// It is raised only where a daemon of before must not read a record: a field means something else now, or
// may have a value that such a daemon would take for another. A new field alone does not raise it: a daemon
// of before passes over it, and loses it with its next Write, so that its zero value has to mean what was
// true before there was the field.
const version = 1

type envelope struct {
	Version int             `json:"version"`
	Record  json.RawMessage `json:"record"`
}

// Write replaces the record at path. When it returns nil the record is on the disk.
func Write(path string, record any) error {
	data, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("record %s: %w", path, err)
	}
	data, err = json.Marshal(envelope{version, data})
	if err != nil {
		return fmt.Errorf("record %s: %w", path, err)
	}
	err = atomicfile.Write(path, data, 0o600)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("record: no space in %s, free some: %w: %w", filepath.Dir(path), err, errdefs.ErrResourceExhausted)
	}
	return err
}

// Read reads the record at path; fields that it does not know are a newer daemon's, and left out. What it
// does not understand is errdefs.ErrDataLoss; no record at all is fs.ErrNotExist.
func Read(path string, record any) error {
	return read(path, record, func(v int) error {
		if v != version {
			return fmt.Errorf("it is of version %d, this daemon reads %d", v, version)
		}
		return nil
	})
}

// ReadPart reads the fields that part has of a record of any version: what has been the same in all of them.
// Its errors are Read's.
func ReadPart(path string, part any) error {
	return read(path, part, func(int) error { return nil })
}

func read(path string, record any, check func(version int) error) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	var e envelope
	err = json.Unmarshal(data, &e)
	if err == nil {
		err = check(e.Version)
	}
	if err == nil {
		err = json.Unmarshal(e.Record, record)
	}
	if err != nil {
		return fmt.Errorf("record %s: %w: %w", path, err, errdefs.ErrDataLoss)
	}
	return nil
}

// Lock is the right to use a folder.
type Lock struct{ file *os.File }

// Acquire takes the lock of dir, which is made if needed. Where another process holds it, the error
// is errdefs.ErrFailedPrecondition and names that process, and the key of the configuration that
// gives another folder.
func Acquire(dir, key string) (*Lock, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder, _ := os.ReadFile(path)
		f.Close()
		return nil, fmt.Errorf("%s is in use by process %s: stop that daemon, or give this one another folder in the key %s: %w", dir, strings.TrimSpace(string(holder)), key, errdefs.ErrFailedPrecondition)
	}
	// The number is for the message above. It is written over the last one, whose block the file keeps: on a
	// full disk there is no other, and a daemon that does not start can't free any.
	if _, err := f.WriteAt(fmt.Appendf(nil, "%-20d\n", os.Getpid()), 0); err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		f.Close()
		return nil, fmt.Errorf("lock: %w", err)
	}
	return &Lock{f}, nil
}

// Release gives the lock back.
func (l *Lock) Release() error { return l.file.Close() }
