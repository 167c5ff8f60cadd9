package server

import (
	"encoding/base64"
	"strconv"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caisson-vm/caisson/imagestore"
)

// criImage converts an image; its id is what PullImage returned and what containers refer to.
func criImage(i imagestore.Image) *cri.Image {
	c := &cri.Image{
		Id:          i.ID,
		RepoTags:    i.Tags,
		RepoDigests: i.Digests,
		Size:        uint64(max(i.Size, 1)), // the CRI wants more than 0
		Spec:        &cri.ImageSpec{Image: i.ID},
		Pinned:      i.Pinned,
	}
	c.Uid, c.Username = imageUser(i.Config.Config.User)
	return c
}

// maxUserName of an image's user, in bytes, is shown: all images must fit into one answer.
const maxUserName = 256

// imageUser tells who an image's command runs as: a number, or a name, or neither.
func imageUser(user string) (*cri.Int64Value, string) {
	name, _, _ := strings.Cut(user, ":")
	if name == "" {
		return nil, ""
	}
	if uid, err := strconv.ParseInt(name, 10, 64); err == nil {
		return &cri.Int64Value{Value: uid}, ""
	}
	return nil, strings.ToValidUTF8(name[:min(len(name), maxUserName)], "")
}

// auth converts the kubelet's credentials. The CRI lets several forms stand beside each other;
// the first of name and password, identity token, basic auth and registry token counts.
func auth(c *cri.AuthConfig) (*imagestore.Auth, error) {
	a := &imagestore.Auth{ServerAddress: c.GetServerAddress()}
	switch {
	case c.GetUsername() != "":
		a.Username, a.Password = c.GetUsername(), c.GetPassword()
	case c.GetIdentityToken() != "":
		a.IdentityToken = c.GetIdentityToken()
	case c.GetAuth() != "":
		plain, err := base64.StdEncoding.DecodeString(c.GetAuth())
		name, password, ok := strings.Cut(strings.TrimRight(string(plain), "\x00"), ":")
		if err != nil || !ok {
			return nil, invalid("credentials: auth is not the base64 form of name:password")
		}
		a.Username, a.Password = name, password
	case c.GetRegistryToken() != "":
		a.RegistryToken = c.GetRegistryToken()
	default:
		return nil, nil
	}
	return a, nil
}
