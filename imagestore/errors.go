package imagestore

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containers/image/v5/docker"
	"github.com/docker/distribution/registry/api/errcode"
)

// registryError gives an error of containers/image its kind. If the pull was ended from outside,
// the reason for that counts.
func registryError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	switch status := statusOf(err); {
	case status == http.StatusUnauthorized:
		return fmt.Errorf("the registry wants other credentials, or there is no such image: %w: %w", err, errdefs.ErrUnauthenticated)
	case status == http.StatusForbidden:
		return fmt.Errorf("the registry forbids it: %w: %w", err, errdefs.ErrPermissionDenied)
	case status == http.StatusNotFound:
		return fmt.Errorf("the registry has no such image: %w: %w", err, errdefs.ErrNotFound)
	case status == http.StatusTooManyRequests:
		return fmt.Errorf("the registry limits the rate of pulls; wait, or pull with credentials: %w: %w", err, errdefs.ErrUnavailable)
	case status >= 400 && status < 500:
		return fmt.Errorf("the registry refuses: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("the registry can't be reached or fails; check its name, the network and registries.conf: %w: %w", err, errdefs.ErrUnavailable)
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
