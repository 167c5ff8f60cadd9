package server

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/capability"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/podvm"
)

// knownCaps are the capabilities there are, as "CAP_CHOWN".
var knownCaps = func() []string {
	var all []string
	for _, c := range capability.ListKnown() {
		all = append(all, "CAP_"+strings.ToUpper(c.String()))
	}
	return all
}()

// podSecurity fills in what the sandbox's security context says.
func podSecurity(p *podvm.PodConfig, sc *cri.LinuxSandboxSecurityContext) error {
	ns := sc.GetNamespaceOptions()
	var err error
	if p.HostNetwork, err = hostNamespace("network", ns.GetNetwork()); err != nil {
		return err
	}
	if p.HostIPC, err = hostNamespace("ipc", ns.GetIpc()); err != nil {
		return err
	}
	s := podvm.Security{
		Privileged:     sc.GetPrivileged(),
		ReadOnlyRootfs: sc.GetReadonlyRootfs(),
	}
	if err := checkSELinux(sc.GetSelinuxOptions()); err != nil {
		return err
	}
	if s.PIDMode, err = pidMode(ns.GetPid()); err != nil {
		return err
	}
	if s.PIDMode == "target" {
		return invalid("pid namespace: a pod can't have mode TARGET")
	}
	if err := userNamespace(&s, ns.GetUsernsOptions()); err != nil {
		return err
	}
	s.User, err = user(sc.GetRunAsUser(), sc.GetRunAsGroup(), "", sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy())
	if err != nil {
		return err
	}
	if s.Seccomp, err = seccomp(sc, sc.GetSeccomp(), s.Privileged); err != nil {
		return err
	}
	if s.AppArmor, err = apparmor(sc, sc.GetApparmor()); err != nil {
		return err
	}
	p.SharePID, p.HostPID = s.PIDMode == "pod", s.PIDMode == "node"
	p.Privileged, p.Security = s.Privileged, s
	return nil
}

// containerSecurity converts a container's security context.
func containerSecurity(sc *cri.LinuxContainerSecurityContext) (podvm.Security, error) {
	ns := sc.GetNamespaceOptions()
	s := podvm.Security{
		Privileged:      sc.GetPrivileged(),
		ReadOnlyRootfs:  sc.GetReadonlyRootfs(),
		NoNewPrivs:      sc.GetNoNewPrivs(),
		MaskedPaths:     sc.GetMaskedPaths(),
		ReadonlyPaths:   sc.GetReadonlyPaths(),
		TargetContainer: ns.GetTargetId(),
	}
	if err := checkSELinux(sc.GetSelinuxOptions()); err != nil {
		return s, err
	}
	if err := podNamespaces(ns); err != nil {
		return s, err
	}
	for _, p := range slices.Concat(s.MaskedPaths, s.ReadonlyPaths) {
		if err := checkAbs("masked or read-only path", p); err != nil {
			return s, err
		}
	}
	var err error
	if s.PIDMode, err = pidMode(ns.GetPid()); err != nil {
		return s, err
	}
	if (s.PIDMode == "target") != (s.TargetContainer != "") {
		return s, invalid("pid namespace: mode TARGET needs a target_id, and no other mode takes one")
	}
	if err := userNamespace(&s, ns.GetUsernsOptions()); err != nil {
		return s, err
	}
	s.User, err = user(sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetRunAsUsername(), sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy())
	if err != nil {
		return s, err
	}
	for _, c := range []struct {
		to   *[]string
		from []string
	}{
		{&s.AddCaps, sc.GetCapabilities().GetAddCapabilities()},
		{&s.DropCaps, sc.GetCapabilities().GetDropCapabilities()},
		{&s.AddAmbientCaps, sc.GetCapabilities().GetAddAmbientCapabilities()},
	} {
		if *c.to, err = capabilities(c.from); err != nil {
			return s, err
		}
	}
	if s.Seccomp, err = seccomp(sc, sc.GetSeccomp(), s.Privileged); err != nil {
		return s, err
	}
	s.AppArmor, err = apparmor(sc, sc.GetApparmor())
	return s, err
}

// hostNamespace converts the mode of a namespace that is the pod's or the node's.
func hostNamespace(what string, m cri.NamespaceMode) (bool, error) {
	switch m {
	case cri.NamespaceMode_POD:
		return false, nil
	case cri.NamespaceMode_NODE:
		return true, nil
	}
	return false, invalid("%s namespace: mode %s; want POD or NODE", what, m)
}

// podNamespaces: a container has its pod's network and IPC, and pods with the node's are refused.
func podNamespaces(ns *cri.NamespaceOption) error {
	for _, n := range []struct {
		what string
		mode cri.NamespaceMode
	}{{"network", ns.GetNetwork()}, {"ipc", ns.GetIpc()}} {
		node, err := hostNamespace(n.what, n.mode)
		if err != nil {
			return err
		}
		if node {
			return invalid("%s namespace: mode NODE in a pod that is a VM; give the container its pod's, POD", n.what)
		}
	}
	return nil
}

func pidMode(m cri.NamespaceMode) (string, error) {
	switch m {
	case cri.NamespaceMode_POD:
		return "pod", nil
	case cri.NamespaceMode_CONTAINER:
		return "container", nil
	case cri.NamespaceMode_NODE:
		return "node", nil
	case cri.NamespaceMode_TARGET:
		return "target", nil
	}
	return "", invalid("pid namespace: mode %d is unknown", m)
}

func userNamespace(s *podvm.Security, u *cri.UserNamespace) error {
	var err error
	if s.UIDs, err = idMaps(u.GetUids()); err != nil {
		return err
	}
	if s.GIDs, err = idMaps(u.GetGids()); err != nil {
		return err
	}
	mapped := len(s.UIDs) > 0 && len(s.GIDs) > 0
	switch {
	case u == nil:
	case u.GetMode() == cri.NamespaceMode_POD && mapped:
		s.UserNamespace = true
	case u.GetMode() == cri.NamespaceMode_POD:
		return invalid("user namespace: mode POD needs mappings of user and group ids")
	case u.GetMode() != cri.NamespaceMode_NODE:
		return invalid("user namespace: mode %s; want POD or NODE", u.GetMode())
	case len(s.UIDs)+len(s.GIDs) > 0:
		return invalid("user namespace: mode NODE takes no mappings")
	}
	return nil
}

func idMaps(list []*cri.IDMapping) ([]podvm.IDMap, error) {
	var all []podvm.IDMap
	for _, m := range list {
		id := podvm.IDMap{Container: m.GetContainerId(), Host: m.GetHostId(), Length: m.GetLength()}
		if id.Length == 0 || id.Container+id.Length < id.Container || id.Host+id.Length < id.Host {
			return nil, invalid("id mapping %d -> %d of length %d: empty or beyond 32 bits", id.Container, id.Host, id.Length)
		}
		all = append(all, id)
	}
	return all, nil
}

func user(uid, gid *cri.Int64Value, name string, groups []int64, policy cri.SupplementalGroupsPolicy) (podvm.User, error) {
	u := podvm.User{Name: name, SupplementalGroups: groups, StrictGroups: policy == cri.SupplementalGroupsPolicy_Strict}
	if policy != cri.SupplementalGroupsPolicy_Merge && policy != cri.SupplementalGroupsPolicy_Strict {
		return u, invalid("supplemental groups policy %d is unknown", policy)
	}
	if uid != nil {
		u.UID = &uid.Value
	}
	if gid != nil {
		u.GID = &gid.Value
	}
	if u.GID != nil && u.UID == nil && name == "" {
		return u, invalid("run_as_group %d without run_as_user", *u.GID)
	}
	ids := slices.Clone(groups)
	for _, id := range []*int64{u.UID, u.GID} {
		if id != nil {
			ids = append(ids, *id)
		}
	}
	for _, id := range ids {
		if id < 0 || id > 1<<31-1 {
			return u, invalid("user or group id %d: want 0 to %d", id, 1<<31-1)
		}
	}
	return u, checkText("user name", name)
}

// capabilities accepts names with and without CAP_, in any case.
func capabilities(names []string) ([]string, error) {
	var all []string
	for _, n := range names {
		c := strings.ToUpper(n)
		if c != "ALL" && !strings.HasPrefix(c, "CAP_") {
			c = "CAP_" + c
		}
		if c != "ALL" && !slices.Contains(knownCaps, c) {
			return nil, invalid("capability %q is unknown", n)
		}
		all = append(all, c)
	}
	return all, nil
}

// seccomp converts a profile. None at all is unconfined, as the CRI says, and so is a privileged
// container, as Kubernetes says.
func seccomp(sc proto.Message, p *cri.SecurityProfile, privileged bool) (podvm.Profile, error) {
	out, err := profile("seccomp", p, oldProfile(sc, "seccomp_profile_path"))
	if err != nil {
		return out, err
	}
	if out.Type == "localhost" && !filepath.IsAbs(out.Localhost) {
		return out, invalid("seccomp profile %q: want an absolute path", out.Localhost)
	}
	if privileged || out.Type == "" {
		return podvm.Profile{Type: "unconfined"}, nil
	}
	return out, nil
}

// apparmor converts a profile. None at all stays none: the runtime's choice.
func apparmor(sc proto.Message, p *cri.SecurityProfile) (podvm.Profile, error) {
	out, err := profile("apparmor", p, oldProfile(sc, "apparmor_profile"))
	out.Localhost = strings.TrimPrefix(out.Localhost, "localhost/")
	return out, err
}

// oldProfile reads a profile in the form that older clients write, a string. The fields are
// deprecated, and pods' contexts have no apparmor_profile, so they are read by name.
func oldProfile(sc proto.Message, field protoreflect.Name) string {
	fd := sc.ProtoReflect().Descriptor().Fields().ByName(field)
	if fd == nil {
		return ""
	}
	return sc.ProtoReflect().Get(fd).String()
}

func profile(what string, p *cri.SecurityProfile, old string) (podvm.Profile, error) {
	ref := p.GetLocalhostRef()
	if p == nil {
		return parseProfile(what, old)
	}
	if (p.GetProfileType() == cri.SecurityProfile_Localhost) != (ref != "") {
		return podvm.Profile{}, invalid("%s profile: localhost_ref %q goes with type Localhost, and only with it", what, ref)
	}
	switch p.GetProfileType() {
	case cri.SecurityProfile_RuntimeDefault:
		return podvm.Profile{Type: "runtime/default"}, nil
	case cri.SecurityProfile_Unconfined:
		return podvm.Profile{Type: "unconfined"}, nil
	case cri.SecurityProfile_Localhost:
		return podvm.Profile{Type: "localhost", Localhost: ref}, checkText(what+" profile", ref)
	}
	return podvm.Profile{}, invalid("%s profile: type %d is unknown", what, p.GetProfileType())
}

// parseProfile reads the old form.
func parseProfile(what, s string) (podvm.Profile, error) {
	ref, local := strings.CutPrefix(s, "localhost/")
	switch {
	case s == "":
		return podvm.Profile{}, nil
	case local && ref != "":
		return podvm.Profile{Type: "localhost", Localhost: ref}, checkText(what+" profile", ref)
	case s == "unconfined":
		return podvm.Profile{Type: "unconfined"}, nil
	case s == "runtime/default" || s == "docker/default":
		return podvm.Profile{Type: "runtime/default"}, nil
	}
	return podvm.Profile{}, invalid("%s profile %q: want runtime/default, unconfined or localhost/...", what, s)
}

// unconfinedType is the SELinux type that asks for no confinement.
const unconfinedType = "spc_t"

// checkSELinux refuses labels. A guest's kernel knows none, and what they keep apart, containers on one
// kernel, VMs do.
func checkSELinux(o *cri.SELinuxOption) error {
	if o.GetType() == unconfinedType || o.GetUser() == "" && o.GetRole() == "" && o.GetType() == "" && o.GetLevel() == "" {
		return nil
	}
	return fmt.Errorf("SELinux label %s:%s:%s:%s: a pod in a VM has a kernel of its own, without SELinux; leave seLinuxOptions unset, or run the pod on a node with another runtime: %w",
		o.GetUser(), o.GetRole(), o.GetType(), o.GetLevel(), errdefs.ErrNotImplemented)
}
