package imagestore

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containers/image/v5/docker/reference"
	"github.com/opencontainers/go-digest"
)

const (
	// maxLine bounds a line of the process of a pull, in bytes: to decode it takes a few times as much.
	maxLine = 64 << 10
	// maxText bounds a text in it, in characters.
	maxText = 2000
	// maxLogged bounds what a pull says to the daemon's log, in lines.
	maxLogged = 1000
)

// request is what the daemon says to the process of a pull, by a pipe, because it has credentials. After it comes
// goOn, for an image that is not in the store.
type request struct {
	Name string
	Auth *Auth
	// Dir is for its files.
	Dir                              string
	RegistriesConf, Policy, AuthFile string
	// Limit is how long a registry may send nothing of a layer.
	Limit time.Duration
	// Memory bounds what the process takes, in bytes.
	Memory int64
}

type goOn struct{}

// report is a line of what the process of a pull says, the empty one that it runs. It is believed no more than the
// registry.
type report struct {
	Log    *logLine `json:",omitempty"`
	Found  *found   `json:",omitempty"`
	Failed *failure `json:",omitempty"`
	// Config is how many bytes of configuration follow the line.
	Config int `json:",omitempty"`
	// Done says that the image's file is complete.
	Done bool `json:",omitempty"`
	// Downloaded and Unpacked are as in PullResult, so far.
	Downloaded, Unpacked int64 `json:",omitempty"`
}

// found is what a name refers to.
type found struct {
	name   name
	Digest digest.Digest // of the manifest or index
	Config digest.Digest
	Total  int64 // of the layers as they are downloaded, in bytes
}

// check looks whether f can be what the name refers to.
func (f *found) check(n name) error {
	if err := errors.Join(f.Digest.Validate(), f.Config.Validate()); err != nil {
		return err
	}
	if f.Total < 0 || f.Total > maxBytes {
		return fmt.Errorf("layers of %d bytes", f.Total)
	}
	if want, ok := n.ref.(reference.Digested); ok && want.Digest().Algorithm() == f.Digest.Algorithm() && want.Digest() != f.Digest {
		return fmt.Errorf("another digest, %s", f.Digest)
	}
	return nil
}

// readReport reads a line. Its texts are valid UTF-8.
func readReport(r *bufio.Reader) (report, error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return report{}, err
	}
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	var got report
	if err := d.Decode(&got); err != nil {
		return report{}, fmt.Errorf("a report that is none: %v", err) // it may be an EOF, which the pipe's is not
	}
	if d.More() {
		return report{}, errors.New("two reports in a line")
	}
	return got, nil
}

// logLine is for the daemon's log.
type logLine struct {
	Level slog.Level
	Text  string
	Attrs []string // keys, each with its value
}

func (l *logLine) log() {
	var args []any
	for _, s := range l.Attrs {
		args = append(args, short(s))
	}
	slog.Log(context.Background(), l.Level, short(l.Text), args...)
}

func short(s string) string { return fmt.Sprintf("%.*s", maxText, s) }

// failure is an error on its way to the daemon.
type failure struct {
	Text  string
	Kinds []string // of kinds
}

// kinds are what is looked for in the chain of an error.
var kinds = map[string]error{
	"NotFound": errdefs.ErrNotFound, "InvalidArgument": errdefs.ErrInvalidArgument, "Unauthenticated": errdefs.ErrUnauthenticated,
	"PermissionDenied": errdefs.ErrPermissionDenied, "Unavailable": errdefs.ErrUnavailable, "DataLoss": errdefs.ErrDataLoss,
	"ResourceExhausted": errdefs.ErrResourceExhausted, "NotImplemented": errdefs.ErrNotImplemented,
	"FailedPrecondition": errdefs.ErrFailedPrecondition,
	"Rejected":           ErrRejected, "NoSpace": syscall.ENOSPC, "Quota": syscall.EDQUOT,
}

func newFailure(err error) *failure {
	f := &failure{Text: short(err.Error())}
	for name, kind := range kinds {
		if errors.Is(err, kind) {
			f.Kinds = append(f.Kinds, name)
		}
	}
	return f
}

// toldError is an error of the process of a pull.
type toldError struct {
	text  string
	kinds []error
}

func (e *toldError) Error() string   { return e.text }
func (e *toldError) Unwrap() []error { return e.kinds }

func (f *failure) err() error {
	e := &toldError{text: short(f.Text)}
	for name, kind := range kinds {
		for _, k := range f.Kinds {
			if k == name {
				e.kinds = append(e.kinds, kind)
				break
			}
		}
	}
	return e
}
