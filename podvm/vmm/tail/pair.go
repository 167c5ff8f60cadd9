package tail

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Pair is what every VM has: its guest's console and its VMM's own words, in one folder.
type Pair struct{ Console, VMM *Log }

// ConsolePath and VMMPath are where the logs of a VM with the folder dir are.
func ConsolePath(dir string) string { return filepath.Join(dir, "console.log") }

// VMMPath is where the VMM's log is.
func VMMPath(dir string) string { return filepath.Join(dir, "vmm.log") }

// OpenPair opens both. Lines of the VMM that contain one of drop are not kept.
func OpenPair(dir string, drop ...string) (Pair, error) {
	console, err := Open(ConsolePath(dir))
	if err != nil {
		return Pair{}, err
	}
	vmm, err := Open(VMMPath(dir), drop...)
	if err != nil {
		return Pair{}, errors.Join(err, console.Close())
	}
	return Pair{console, vmm}, nil
}

// Close closes both.
func (p Pair) Close() error { return errors.Join(p.Console.Close(), p.VMM.Close()) }

// String is the end of both, to be appended to an error.
func (p Pair) String() string { return words(p.Console.String(), p.VMM.String()) }

// panicMark is how Linux begins to say why it panics, and panicMax how much of it is kept, in bytes.
const (
	panicMark = "Kernel panic - not syncing: "
	panicMax  = 200
)

// Panic is why the guest's kernel panicked, in its own words, which the registers and stacks that it
// shows after them may have driven out of the console's end.
func (p Pair) Panic() error {
	all, _ := os.ReadFile(p.Console.path) // what can't be read says nothing
	_, reason, found := strings.Cut(string(all), panicMark)
	if !found {
		return errors.New("the guest's kernel panicked")
	}
	reason, _, _ = strings.Cut(reason, "\n")
	reason = strings.TrimSpace(reason[:min(len(reason), panicMax)])
	return fmt.Errorf("the guest's kernel panicked: %s", strings.ToValidUTF8(reason, "?"))
}

// LastWords is the same of a VM that nobody watched at its end.
func LastWords(dir string) string { return words(Read(ConsolePath(dir)), Read(VMMPath(dir))) }

func words(console, vmm string) string {
	var b strings.Builder
	if console != "" {
		fmt.Fprintf(&b, "; the guest's console ends: %s", console)
	}
	if vmm != "" {
		fmt.Fprintf(&b, "; the VMM's log ends: %s", vmm)
	}
	return b.String()
}
