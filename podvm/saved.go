package podvm

import (
	"errors"
	"io/fs"
	"os"
	"sync/atomic"

	"github.com/caisson-vm/caisson/podvm/state"
)

// saved is a record and the file in which it survives. Who reads it gets the last one and never
// waits for the disk; who changes it waits for the change before.
type saved[T any] struct {
	path string
	turn chan struct{} // holds a value while a change is written
	gone bool          // the file is not written any more; this and behind belong to who has the turn
	// behind says that the last change is not in the file.
	behind bool
	last   atomic.Pointer[T]
}

// newSaved holds a record that was read from its file, or is still to be written.
func newSaved[T any](path string, record T) *saved[T] {
	s := &saved[T]{path: path, turn: make(chan struct{}, 1)}
	s.last.Store(&record)
	return s
}

// now is the record. Nobody changes it.
func (s *saved[T]) now() *T { return s.last.Load() }

// update writes a changed record and then shows it. The change gets a copy, of which it replaces
// maps and slices rather than altering them; when it returns false there is none. An error says
// that the file is not what the record is: the change is shown nevertheless, because it has happened.
func (s *saved[T]) update(change func(*T) bool) (changed bool, err error) {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	next := *s.last.Load()
	if !change(&next) {
		return false, nil
	}
	if !s.gone {
		err = state.Write(s.path, next)
		s.behind = err != nil
	}
	s.last.Store(&next)
	return true, err
}

// settle writes the record once more where its last change could not be written.
func (s *saved[T]) settle() error {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	if s.gone || !s.behind {
		return nil
	}
	err := state.Write(s.path, *s.last.Load())
	s.behind = err != nil
	return err
}

// set is update with a change that always is one.
func (s *saved[T]) set(change func(*T)) error {
	_, err := s.update(func(r *T) bool { change(r); return true })
	return err
}

// keep leaves the file as it is: changes are in memory only.
func (s *saved[T]) keep() {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	s.gone = true
}

// remove removes the file, for good: changes that come later are in memory only. It is idempotent.
func (s *saved[T]) remove() error {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	s.gone = true
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
