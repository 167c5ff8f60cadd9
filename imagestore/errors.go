package imagestore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containers/image/v5/docker"
	"github.com/docker/distribution/registry/api/errcode"
)

// failed gives an error of containers/image its kind, and tells the caller only that, the HTTP status, and what
// this machine itself has found out about the image's own registry. What else the text has goes to the log: a
// registry can refer this machine to any host, for a token too, and what that answers is not for those who may
// pull. If the pull was ended from outside, the reason for that counts.
func (m *remote) failed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	m.log(err)
	status := statusOf(err)
	switch answer := fmt.Sprintf("(HTTP %d)", status); {
	case status == http.StatusUnauthorized:
		return fmt.Errorf("the registry wants other credentials, or there is no such image %s: %w", answer, errdefs.ErrUnauthenticated)
	case status == http.StatusForbidden:
		return fmt.Errorf("the registry forbids it %s: %w", answer, errdefs.ErrPermissionDenied)
	case status == http.StatusNotFound:
		return fmt.Errorf("the registry has no such image %s: %w", answer, errdefs.ErrNotFound)
	case status == http.StatusTooManyRequests:
		return fmt.Errorf("the registry limits the rate of pulls %s; wait, or pull with credentials: %w", answer, errdefs.ErrUnavailable)
	case status >= 400 && status < 500:
		return fmt.Errorf("the registry refuses %s; the daemon's log says more: %w", answer, errdefs.ErrFailedPrecondition)
	case status > 0:
		return fmt.Errorf("the registry fails %s; pull again later, or have it checked: %w", answer, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("the registry can't be reached or fails (%s); check its name, the network and registries.conf: %w", m.found(err), errdefs.ErrUnavailable)
}

// log has the text of an error that nobody else is shown. It is as long as who answered has made it.
func (m *remote) log(err error) {
	slog.Warn("registry of an image", "image", m.name.String(), "err", fmt.Sprintf("%.2000s", err))
}

// found tells what err says of a connection to one of the image's own hosts, by this machine's own words.
func (m *remote) found(err error) string {
	const nothing = "the daemon's log says why"
	var request *url.Error
	if !errors.As(err, &request) {
		var number syscall.Errno
		if errors.As(err, &number) {
			return number.Error()
		}
		return nothing
	}
	to, bad := url.Parse(request.URL)
	if bad != nil || !slices.Contains(m.hosts, to.Host) {
		return nothing
	}
	var network *net.OpError
	var lookup *net.DNSError
	var certificate *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	switch err := request.Err; {
	case errors.As(err, &network), errors.As(err, &lookup), errors.As(err, &certificate), errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		return err.Error()
	}
	return nothing
}

// responseStatus is how containers/image tells the status of answers that are not JSON.
var responseStatus = regexp.MustCompile(`StatusCode: (\d{3})`)

// statusOf returns the HTTP status that err stems from, 0 if there is none.
func statusOf(err error) int {
	var credentials docker.ErrUnauthorizedForCredentials
	var unexpected docker.UnexpectedHTTPStatusError
	var coded errcode.ErrorCoder
	switch {
	case errors.As(err, &credentials):
		return http.StatusUnauthorized
	case errors.Is(err, docker.ErrTooManyRequests):
		return http.StatusTooManyRequests
	case errors.As(err, &unexpected):
		return unexpected.StatusCode
	case errors.As(err, &coded) && coded.ErrorCode().Descriptor().HTTPStatusCode != http.StatusInternalServerError:
		return coded.ErrorCode().Descriptor().HTTPStatusCode
	}
	if found := responseStatus.FindStringSubmatch(err.Error()); found != nil {
		status, _ := strconv.Atoi(found[1])
		return status
	}
	return 0
}

// noSpace tells whether err says that the disk, or a quota on it, is full.
func noSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
