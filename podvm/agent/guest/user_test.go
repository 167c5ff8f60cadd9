package guest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caisson-vm/caisson/podvm/agent"
)

func TestResolveUser(t *testing.T) {
	dir := t.TempDir()
	makeImage(t, dir)
	for name, test := range map[string]struct {
		user   *agent.User
		uid    uint32
		gid    uint32
		groups []uint32
		home   string
		fails  bool
	}{
		"nobody asked":     {nil, 0, 0, []uint32{0, 1002}, "/root", false},
		"name":             {&agent.User{Name: "web"}, 1000, 1001, []uint32{1001, 1002, 1003}, "/home/web", false},
		"name wins":        {&agent.User{Name: "web", Uid: 7, HasUid: true}, 1000, 1001, []uint32{1001, 1002, 1003}, "/home/web", false},
		"id":               {&agent.User{Uid: 1000, HasUid: true}, 1000, 1001, []uint32{1001, 1002, 1003}, "/home/web", false},
		"id and group":     {&agent.User{Uid: 1000, HasUid: true, Gid: 5, HasGid: true}, 1000, 5, []uint32{5, 1002, 1003}, "/home/web", false},
		"of the image":     {&agent.User{Name: "1000:wheel"}, 1000, 1003, []uint32{1002, 1003}, "/home/web", false},
		"unknown id":       {&agent.User{Uid: 4242, HasUid: true}, 4242, 0, []uint32{0}, "/", false},
		"more groups":      {&agent.User{Uid: 1000, HasUid: true, SupplementalGroups: []uint32{50000, 1002}}, 1000, 1001, []uint32{1001, 1002, 1003, 50000}, "/home/web", false},
		"strict":           {&agent.User{Uid: 1000, HasUid: true, StrictGroups: true, SupplementalGroups: []uint32{50000}}, 1000, 1001, []uint32{1001, 50000}, "/home/web", false},
		"unknown name":     {&agent.User{Name: "ghost"}, 0, 0, nil, "", true},
		"unknown group":    {&agent.User{Name: "web:ghost"}, 0, 0, nil, "", true},
		"an id too large":  {&agent.User{Name: "99999999999"}, 0, 0, nil, "", true},
		"a negative id":    {&agent.User{Name: "-1"}, 0, 0, nil, "", true},
		"a negative group": {&agent.User{Name: "0:-1"}, 0, 0, nil, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := resolveUser(dir, test.user)
			if test.fails {
				if err == nil {
					t.Errorf("got %+v", a)
				}
				return
			}
			if err != nil || a.uid != test.uid || a.gid != test.gid || !slices.Equal(a.groups, test.groups) || a.home != test.home {
				t.Errorf("got %+v, %v", a, err)
			}
		})
	}
}

func TestResolveUserInHostileImage(t *testing.T) {
	for name, lay := range map[string]func(dir string) error{
		"a link out of it": func(dir string) error {
			return os.Symlink("../../../../../etc/passwd", filepath.Join(dir, "etc/passwd"))
		},
		"an absolute link": func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "etc/passwd")) },
		"a link to itself": func(dir string) error { return os.Symlink("passwd", filepath.Join(dir, "etc/passwd")) },
		"nothing":          func(string) error { return nil },
		"nonsense": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte(strings.Repeat("::::\n\x00:", 999)), 0o644)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := lay(dir); err != nil {
				t.Fatal(err)
			}
			if a, err := resolveUser(dir, &agent.User{Uid: 0, HasUid: true}); err != nil || a.uid != 0 || a.home != "/" {
				t.Errorf("got %+v, %v", a, err)
			}
		})
	}
	for name, mode := range map[string]os.FileMode{"a pipe": os.ModeNamedPipe, "a folder": os.ModeDir} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "etc/passwd")
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if mode == os.ModeDir {
				os.Mkdir(path, 0o755)
			} else {
				mkfifo(t, path)
			}
			if _, err := resolveUser(dir, nil); err == nil {
				t.Error("read it")
			}
		})
	}
	dir := t.TempDir()
	makeImage(t, dir)
	if err := os.Truncate(filepath.Join(dir, "etc/group"), accountsMax+1); err != nil {
		t.Fatal(err)
	}
	if _, err := resolveUser(dir, nil); err == nil || !strings.Contains(err.Error(), "over") {
		t.Errorf("a file too large: %v", err)
	}
}
