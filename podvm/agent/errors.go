package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/status"
)

// textMax bounds the texts that the host takes from a guest, in bytes.
const textMax = 1 << 10

// codes are the errdefs kinds that cross a stream by name, see Reply.Code.
var codes = map[string]error{
	"not found":           errdefs.ErrNotFound,
	"already exists":      errdefs.ErrAlreadyExists,
	"failed precondition": errdefs.ErrFailedPrecondition,
	"invalid argument":    errdefs.ErrInvalidArgument,
	"unavailable":         errdefs.ErrUnavailable,
	"resource exhausted":  errdefs.ErrResourceExhausted,
	"not implemented":     errdefs.ErrNotImplemented,
	"internal":            errdefs.ErrInternal,
}

// ReplyTo returns the Reply that carries an error, or success for nil.
func ReplyTo(err error) Reply {
	if err == nil {
		return Reply{}
	}
	text := clean(err.Error())
	if text == "" {
		text = "the agent failed without a word"
	}
	for name, kind := range codes {
		if errors.Is(err, kind) {
			return Reply{Error: text, Code: name}
		}
	}
	return Reply{Error: text, Code: "internal"}
}

// Err returns the error of a reply as one of an errdefs kind, or nil. Its text, which is the
// guest's, is cut to 1 KiB and holds no control characters.
func (r Reply) Err() error {
	if r.Error == "" {
		return nil
	}
	kind, ok := codes[r.Code]
	if !ok {
		kind = errdefs.ErrInternal
	}
	return guestError{clean(r.Error), kind}
}

// guestError is an error from the guest.
type guestError struct {
	text string
	kind error
}

func (e guestError) Error() string { return e.text }
func (e guestError) Unwrap() error { return e.kind }

// fromRPC gives an error of a ttrpc call its errdefs kind and bounds its text. Details that the guest adds stay
// unread: they hold further errors, as deep as it likes.
func fromRPC(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	st, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("the channel to the agent broke: %w: %w", err, errdefs.ErrUnavailable)
	}
	native := errgrpc.ToNative(status.Error(st.Code(), st.Message()))
	kind := errdefs.Resolve(native)
	if kind == nil || kind == native {
		kind = errdefs.ErrInternal
	}
	text := strings.TrimSuffix(native.Error(), ": "+kind.Error())
	return guestError{clean(text), kind}
}

// clean makes a text from the guest safe to log and to show.
func clean(s string) string {
	if len(s) > textMax {
		s = s[:textMax]
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r == 0x7f || r == utf8.RuneError:
			return -1
		}
		return r
	}, s)
}
