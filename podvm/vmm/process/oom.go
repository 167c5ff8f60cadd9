package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// oomScoreMax is that of a process which goes before all others.
const oomScoreMax = 1000

func oomScorePath(pid int) string { return fmt.Sprintf("/proc/%d/oom_score_adj", pid) }

// expendable makes a process one like others for a kernel that is out of memory, until SetOOMScore says more of
// it: it inherits the daemon's protection, and no pod is to live on at the cost of the node's services.
func expendable(pid int) error {
	err := os.WriteFile(oomScorePath(pid), []byte("0"), 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH): // it has ended already
		return nil
	case errors.Is(err, fs.ErrPermission): // it is more expendable, and may not become less so
		return nil
	}
	return err
}

// SetOOMScore tells a kernel that is out of memory how expendable the process is that was started in the folder:
// oom_score_adj, -1000 to 1000. It always goes before this process. One that has ended is no error.
func SetOOMScore(dir string, score int) error {
	own, err := oomScore(os.Getpid())
	if err != nil {
		return err
	}
	score = min(max(score, own+1), oomScoreMax)
	err = inFolder(dir, func(p *Process) error { return p.setOOMScore(score) })
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// SameOOMScore makes the process that was started in the folder as expendable as that of another folder, if
// both are there.
func SameOOMScore(dir, other string) error {
	var score int
	err := inFolder(other, func(p *Process) (err error) {
		score, err = oomScore(p.PID())
		return err
	})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	return SetOOMScore(dir, score)
}

// inFolder calls do with the process whose identity was saved in the folder. Nobody waits for its end.
func inFolder(dir string, do func(*Process) error) error {
	id, err := saved(dir)
	if err != nil {
		return err
	}
	p, err := find(id)
	if err != nil {
		return err
	}
	defer p.pidfd.Close()
	return do(p)
}

// setOOMScore opens the file before it makes sure that the process is there: then the file is not that of
// another one, which came to the number later.
func (p *Process) setOOMScore(score int) error {
	f, err := os.OpenFile(oomScorePath(p.PID()), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.signal(0); err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(score))
	return err
}

func oomScore(pid int) (int, error) {
	text, err := os.ReadFile(oomScorePath(pid))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}
