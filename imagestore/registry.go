package imagestore

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containers/image/v5/docker"
	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/pkg/blobinfocache/none"
	"github.com/containers/image/v5/pkg/sysregistriesv2"
	"github.com/containers/image/v5/signature"
	"github.com/containers/image/v5/types"
	"github.com/opencontainers/go-digest"
)

const (
	systemPolicy   = "/etc/containers/policy.json"
	systemAuthFile = "/etc/containers/auth.json"
)

// registries speaks to registries as the node's configuration says. It is the one place that knows
// containers/image.
type registries struct {
	policy string
	sys    types.SystemContext
}

func newRegistries(o Options, staging string) *registries {
	r := &registries{policy: o.Policy, sys: types.SystemContext{
		SystemRegistriesConfPath: o.RegistriesConf,
		AuthFilePath:             o.AuthFile,
		// Containers/image wants to keep aliases that users confirm; nobody is asked here.
		UserShortNameAliasConfPath: filepath.Join(staging, "short-names.conf"),
		DockerRegistryUserAgent:    "caisson",
		OSChoice:                   "linux",
		BigFilesTemporaryDir:       staging,
	}}
	if o.RegistriesConf != "" {
		r.sys.SystemRegistriesConfDirPath = o.RegistriesConf + ".d"
	}
	if o.AuthFile == "" {
		r.sys.AuthFilePath = systemAuthFile
	}
	return r
}

// reload has registries.conf read anew: the operator may have edited it.
func (r *registries) reload() { sysregistriesv2.InvalidateCache() }

// name is a full image name: registry, repository, and either a tag or a digest.
type name struct{ ref reference.Named }

func (n name) String() string { return n.ref.String() }

// tag is the name if it has a tag, else "".
func (n name) tag() string {
	if _, ok := n.ref.(reference.NamedTagged); ok {
		return n.ref.String()
	}
	return ""
}

// withDigest is the name of what n refers to by the manifest's digest.
func (n name) withDigest(d digest.Digest) string { return n.ref.Name() + "@" + d.String() }

// Ref is the digest by which the repository of the name has the image, where it is known by one, or else the
// first of its digests, or its id.
func (i Image) Ref(name string) string {
	if len(i.Digests) == 0 {
		return i.ID
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return i.Digests[0]
	}
	if d, ok := named.(reference.Digested); ok { // there may be several of a repository: of an index, of a manifest
		if exact := named.Name() + "@" + d.Digest().String(); slices.Contains(i.Digests, exact) {
			return exact
		}
	}
	for _, d := range i.Digests {
		if strings.HasPrefix(d, named.Name()+"@") {
			return d
		}
	}
	return i.Digests[0]
}

// resolve makes a full name of what users write. Short names are looked up in the aliases of
// registries.conf and else belong to docker.io; without tag and digest, latest is meant; of both,
// the digest counts.
func (r *registries) resolve(ref string) (name, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return name{}, fmt.Errorf("image name %.300q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	if aliased, err := r.alias(ref, named); err != nil {
		return name{}, err
	} else if aliased != nil {
		named = aliased
	}
	if digested, ok := named.(reference.Digested); ok {
		named, err = reference.WithDigest(reference.TrimNamed(named), digested.Digest())
		if err != nil {
			return name{}, fmt.Errorf("image name %.300q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
		}
	}
	return name{reference.TagNameOnly(named)}, nil
}

// alias returns what registries.conf says a short name stands for, with the tag and digest of
// named; nil if ref is not short or has no alias.
func (r *registries) alias(ref string, named reference.Named) (reference.Named, error) {
	short, err := reference.Parse(ref)
	if err != nil {
		return nil, nil // a full name's forms have been checked by the caller
	}
	repository, ok := short.(reference.Named)
	if first, _, more := strings.Cut(ref, "/"); !ok || more && (strings.ContainsAny(first, ".:") || first == "localhost") {
		return nil, nil
	}
	full, _, err := sysregistriesv2.ResolveShortNameAlias(&r.sys, repository.Name())
	if err != nil {
		return nil, fmt.Errorf("short name %q: read registries.conf: %w: %w", ref, err, errdefs.ErrFailedPrecondition)
	}
	if full == nil {
		return nil, nil
	}
	if tagged, ok := named.(reference.Tagged); ok {
		if full, err = reference.WithTag(full, tagged.Tag()); err != nil {
			return nil, err
		}
	}
	if digested, ok := named.(reference.Digested); ok {
		return reference.WithDigest(full, digested.Digest())
	}
	return full, nil
}

// remote is an image in a registry, with its manifest read and allowed by the policy.
type remote struct {
	name   name
	hosts  []string // of the registry and its mirrors, with their ports
	src    types.ImageSource
	digest digest.Digest // of what the name refers to: a manifest or an index
	config digest.Digest
	size   int64 // of the configuration
	layers []layer
}

// layer is a layer as the manifest has it: compressed.
type layer struct {
	digest digest.Digest
	size   int64
}

// total is the sum of the image's layers as they are downloaded, in bytes.
func (m *remote) total() int64 {
	var sum int64
	for _, l := range m.layers {
		sum += l.size
	}
	return sum
}

// open finds the image, chooses the instance for this machine and checks the policy.
func (r *registries) open(ctx context.Context, n name, auth *Auth) (*remote, error) {
	sys, err := r.system(n, auth)
	if err != nil {
		return nil, err
	}
	ref, err := docker.NewReference(n.ref)
	if err != nil {
		return nil, fmt.Errorf("image name %q: %w: %w", n, err, errdefs.ErrInvalidArgument)
	}
	m := &remote{name: n, hosts: hostsOf(n, sys)}
	if m.src, err = ref.NewImageSource(ctx, sys); err != nil {
		return nil, m.failed(ctx, err)
	}
	if err := m.read(ctx, r, sys); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// hostsOf lists whom the node's configuration, or the name itself, says to ask for an image. What is wrong with
// either has an error where it is asked for.
func hostsOf(n name, sys *types.SystemContext) []string {
	hosts := []string{reference.Domain(n.ref), "registry-1.docker.io"} // the one of docker.io
	if found, err := sysregistriesv2.FindRegistry(sys, n.ref.Name()); err == nil && found != nil {
		sources, _ := found.PullSourcesFromReference(n.ref)
		for _, s := range sources {
			hosts = append(hosts, reference.Domain(s.Reference))
		}
	}
	return hosts
}

func (m *remote) close() {
	if err := m.src.Close(); err != nil {
		slog.Warn("close registry connection", "image", m.name.String(), "err", err)
	}
}

// system is what one pull adds to the node's configuration.
func (r *registries) system(n name, auth *Auth) (*types.SystemContext, error) {
	sys := r.sys
	found, err := sysregistriesv2.FindRegistry(&sys, n.ref.Name())
	switch {
	case err != nil:
		return nil, fmt.Errorf("read registries.conf: %w: %w", err, errdefs.ErrFailedPrecondition)
	case found != nil && found.Blocked:
		return nil, fmt.Errorf("registry %s is blocked by %s: %w", found.Prefix, sysregistriesv2.ConfigPath(&sys), errdefs.ErrPermissionDenied)
	case found == nil && loopback(reference.Domain(n.ref)):
		// A registry on this machine may do without TLS, as with containerd.
		sys.DockerInsecureSkipTLSVerify = types.OptionalBoolTrue
	}
	if auth != nil && !auth.isFor(reference.Domain(n.ref)) {
		slog.Warn("credentials are for another registry and not used", "image", n.String(), "registry", auth.ServerAddress)
		auth = nil
	}
	if auth == nil {
		return &sys, nil
	}
	sys.DockerBearerRegistryToken = auth.RegistryToken
	user, password := auth.Username, auth.Password
	if auth.Auth != "" {
		plain, err := base64.StdEncoding.DecodeString(auth.Auth)
		if err != nil {
			return nil, fmt.Errorf("credentials for %s are not base64: %w", n, errdefs.ErrInvalidArgument)
		}
		user, password, _ = strings.Cut(strings.TrimRight(string(plain), "\x00"), ":")
	}
	if user != "" || password != "" || auth.IdentityToken != "" {
		sys.DockerAuthConfig = &types.DockerAuthConfig{Username: user, Password: password, IdentityToken: auth.IdentityToken}
	}
	return &sys, nil
}

// isFor tells whether the credentials are for the registry: they name it, by address or URL, or none.
func (a *Auth) isFor(registry string) bool {
	address := a.ServerAddress
	if _, rest, ok := strings.Cut(address, "://"); ok {
		address = rest
	}
	host, _, _ := strings.Cut(address, "/")
	return host == "" || canonical(host) == canonical(registry)
}

// canonical gives Docker's registry, which has several names, one of them.
func canonical(host string) string {
	switch host = strings.ToLower(host); host {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return host
}

func loopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// allow checks the signature policy.
func (r *registries) allow(ctx context.Context, m *remote, unparsed types.UnparsedImage) error {
	policy, err := r.readPolicy()
	if err != nil {
		return err
	}
	pc, err := signature.NewPolicyContext(policy)
	if err != nil {
		return fmt.Errorf("signature policy: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	defer pc.Destroy()
	if _, err := pc.IsRunningImageAllowed(ctx, unparsed); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var reason signature.PolicyRequirementError
		if !errors.As(err, &reason) { // what stands where signatures were looked for, or of a file of the node's
			m.log(err)
			reason = "the signatures can't be read or checked; the daemon's log says why"
		}
		return fmt.Errorf("%w: %w: %w", ErrRejected, reason, errdefs.ErrPermissionDenied)
	}
	return nil
}

func (r *registries) readPolicy() (*signature.Policy, error) {
	path := r.policy
	if path == "" {
		path = systemPolicy
	}
	policy, err := signature.NewPolicyFromFile(path)
	if errors.Is(err, fs.ErrNotExist) && r.policy == "" {
		return &signature.Policy{Default: signature.PolicyRequirements{signature.NewPRInsecureAcceptAnything()}}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("signature policy %s: %w: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	return policy, nil
}

// blob opens a stream of a blob. Its digest is the caller's to check. Interrupted streams are
// resumed as far as the registry can.
func (m *remote) blob(ctx context.Context, l layer) (io.ReadCloser, error) {
	// Without the URLs that a manifest may bring: it must not choose whom this machine speaks to.
	stream, _, err := m.src.GetBlob(ctx, types.BlobInfo{Digest: l.digest, Size: l.size}, none.NoCache)
	if err != nil {
		return nil, m.failed(ctx, err)
	}
	return stream, nil
}
