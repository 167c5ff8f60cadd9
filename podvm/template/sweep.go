package template

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

func (s *Store) sweep() error {
	folders, err := os.ReadDir(s.options.Dir)
	if err != nil {
		return fmt.Errorf("templates: %w", err)
	}
	for _, f := range folders {
		dir := filepath.Join(s.options.Dir, f.Name())
		reason := s.obsolete(dir)
		if reason == "" {
			continue
		}
		slog.Info("remove template", "template", f.Name(), "reason", reason)
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("templates: %w", err)
		}
	}
	runs, err := filepath.Glob(filepath.Join(s.options.Run, runPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range runs {
		if err := s.killLeft(dir); err != nil {
			return err
		}
	}
	return nil
}

// unusedMax is how long the template of a namespace, which may be deleted by now, is kept without
// anybody making a clone of it.
const unusedMax = 24 * time.Hour

// obsolete says why a template is of no use any more; "": it is.
func (s *Store) obsolete(dir string) string {
	m, err := readManifest(dir)
	if err != nil {
		return err.Error()
	}
	if filepath.Base(dir) != s.key(m.Scope) {
		return "made for another guest, VMM or machine"
	}
	if s.options.Wants != nil && !s.options.Wants(m.Scope) {
		return "made for another vm.template than is configured"
	}
	if unused(dir, m) {
		return "not used for a day"
	}
	return ""
}

// usedPath is the file whose time is that of the last clone.
func usedPath(dir string) string { return filepath.Join(dir, manifestName) }

// touch notes that a template is used now.
func touch(dir string) {
	now := time.Now()
	if err := os.Chtimes(usedPath(dir), now, now); err != nil {
		slog.Warn("note that a template is used", "template", filepath.Base(dir), "err", err)
	}
}

// unused tells whether it is the template of a namespace that had no clone for unusedMax.
func unused(dir string, m manifest) bool {
	info, err := os.Stat(usedPath(dir))
	return m.Scope != "" && (err != nil || time.Since(info.ModTime()) > unusedMax)
}

// sweepPause is how often templates that nobody uses are looked for.
const sweepPause = time.Hour

// Sweep removes templates of namespaces that were not used for a day, now and again until the store is closed.
// cloned tells whether clones of one run: without it they would go on, and the disk have no more room.
func (s *Store) Sweep(cloned func(dir string) bool) {
	s.making.Go(func() {
		for t := time.NewTicker(sweepPause); ; {
			select {
			case <-t.C:
				s.sweepUnused(cloned)
			case <-s.ctx.Done():
				t.Stop()
				return
			}
		}
	})
}

func (s *Store) sweepUnused(cloned func(dir string) bool) {
	folders, err := os.ReadDir(s.options.Dir)
	if err != nil {
		slog.Warn("look for templates that nobody uses", "err", err)
	}
	for _, f := range folders {
		dir := filepath.Join(s.options.Dir, f.Name())
		m, err := readManifest(dir)
		if err != nil || !unused(dir, m) || cloned(dir) {
			continue
		}
		gone, err := s.withdraw(dir, m)
		if gone != "" {
			slog.Info("remove template", "template", f.Name(), "reason", "not used for a day")
			err = os.RemoveAll(gone)
		}
		if err != nil {
			slog.Warn("remove a template that nobody uses: the next start of the daemon tries again", "template", f.Name(), "err", err)
		}
	}
}

// withdraw gives a template that is still unused another name, by which nobody finds it; "": it is used by now.
func (s *Store) withdraw(dir string, m manifest) (gone string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[m.Scope]
	if e != nil && e.busy() || !unused(dir, m) {
		return "", nil
	}
	gone = dir + "-unused"
	if err := os.Rename(dir, gone); err != nil {
		return "", err
	}
	if e != nil && e.dir == dir {
		delete(s.entries, m.Scope)
	}
	return gone, nil
}

// Usage is what templates take on the disk: how many, and bytes, also of those that are being made.
func (s *Store) Usage() (n int, bytes int64) {
	folders, err := os.ReadDir(s.options.Dir)
	if err != nil {
		return 0, 0
	}
	for _, f := range folders {
		dir := filepath.Join(s.options.Dir, f.Name())
		if _, err := os.Stat(usedPath(dir)); err == nil {
			n++
		}
		bytes += diskUsage(dir)
	}
	return n, bytes
}
