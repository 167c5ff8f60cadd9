package images

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	libDir     = "/lib/x86_64-linux-gnu"

	passwd = `root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
`
	group = `root:x:0:
daemon:x:1:
bin:x:2:
tty:x:5:
www-data:x:33:
nogroup:x:65534:
`
)

// base is what most images begin with: a small system with a shell.
type base struct {
	layer v1.Layer
	// entries are the layer's, for those who must know what is in it.
	entries *Layer
}

// newBase makes a system of busybox, with what critest needs and Debian's busybox lacks: pgrep and
// ipcs. Every applet is a hard link, so that masking one masks no other.
func newBase(root string) (*base, error) {
	l := &Layer{}
	for _, dir := range []string{"bin", "dev", "etc", "home", "lib", "proc", "run", "sys", "usr", "usr/bin", "var"} {
		l.Dir(dir, 0o755)
	}
	l.Dir("root", 0o700).Dir("tmp", 0o1777).Dir("var/tmp", 0o1777)
	l.Symlink("var/run", "/run").Symlink("usr/bin/env", "/bin/env")
	l.File("etc/passwd", 0o644, passwd).File("etc/group", 0o644, group)
	files, err := closure(root, "/bin/busybox", "/bin/toybox", "/usr/bin/ipcs")
	if err != nil {
		return nil, err
	}
	if err := l.Copy(root, files...); err != nil {
		return nil, err
	}
	l.Link("bin/pgrep", "/bin/toybox")
	applets, err := applets(root)
	if err != nil {
		return nil, err
	}
	for _, applet := range applets {
		l.Link("bin/"+applet, "/bin/busybox")
	}
	layer, err := l.Build(compression.GZip)
	if err != nil {
		return nil, err
	}
	return &base{layer: layer, entries: l}, nil
}

// applets asks busybox, run by its own dynamic linker, what it can be called as.
func applets(root string) ([]string, error) {
	linker := filepath.Join(root, libDir, "ld-linux-x86-64.so.2")
	list := exec.Command(linker, "--library-path", filepath.Join(root, libDir), filepath.Join(root, "bin/busybox"), "--list")
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox's applets: %w", err)
	}
	var all []string
	for applet := range strings.FieldsSeq(string(out)) {
		if applet != "busybox" {
			all = append(all, applet)
		}
	}
	return all, nil
}

// busybox is the configuration of an image with a shell.
func busybox() v1.Config {
	return v1.Config{Env: []string{searchPath}, Cmd: []string{"sh"}}
}

// with builds an image of the base and one more layer.
func (b *base) with(config v1.Config, top *Layer) (v1.Image, error) {
	layer, err := top.Build(compression.GZip)
	if err != nil {
		return nil, err
	}
	return image(config, types.OCIManifestSchema1, b.layer, layer)
}

// servers are the images of programs that people run: a shell, web servers, pause.
func servers(_ context.Context, root string, b *base) ([]Image, error) {
	shell, err := image(busybox(), types.DockerManifestSchema2, b.layer)
	if err != nil {
		return nil, err
	}
	shells, err := index(shell, types.DockerManifestList)
	if err != nil {
		return nil, err
	}
	web, err := nginx(root, b, 80)
	if err != nil {
		return nil, err
	}
	webs, err := index(web, types.OCIImageIndex)
	if err != nil {
		return nil, err
	}
	hostnet, err := nginx(root, b, 12003)
	if err != nil {
		return nil, err
	}
	httpd, err := apache(root, b)
	if err != nil {
		return nil, err
	}
	pause, err := pause(root)
	if err != nil {
		return nil, err
	}
	config := busybox()
	config.Volumes = map[string]struct{}{"/seeded": {}, "/made": {}, "/mounted": {}}
	stateful, err := b.with(config, new(Layer).File("seeded/seed", 0o640, "seed\n").File("mounted/hidden", 0o644, ""))
	if err != nil {
		return nil, err
	}
	return []Image{
		{Refs: []string{Stateful}, Single: stateful},
		{Refs: []string{Busybox, "registry.k8s.io/e2e-test-images/busybox:1.29-2"}, Single: shell, Index: shells},
		{Refs: []string{Nginx, "registry.k8s.io/e2e-test-images/nginx:1.14-2"}, Single: web, Index: webs},
		{Refs: []string{"gcr.io/k8s-staging-cri-tools/hostnet-nginx-amd64:latest"}, Single: hostnet},
		{Refs: []string{"registry.k8s.io/e2e-test-images/httpd:2.4.39-4"}, Single: httpd},
		{Refs: []string{"registry.k8s.io/pause:3.9", "k8s.gcr.io/pause:3.9"}, Single: pause},
	}, nil
}

// nginx serves a page on the port, IPv4 and IPv6.
func nginx(root string, b *base, port int) (v1.Image, error) {
	l := &Layer{}
	files, err := closure(root, "/usr/sbin/nginx")
	if err != nil {
		return nil, err
	}
	if err := l.Copy(root, files...); err != nil {
		return nil, err
	}
	l.Dir("var/lib/nginx", 0o755).Dir("var/log/nginx", 0o755)
	l.File("usr/share/nginx/html/index.html", 0o644, "<html><body>Welcome to nginx!</body></html>\n")
	l.File("etc/nginx/nginx.conf", 0o644, fmt.Sprintf(`user www-data;
worker_processes 1;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events {}
http {
	access_log /dev/stdout;
	default_type text/html;
	server {
		listen %d;
		listen [::]:%d;
		root /usr/share/nginx/html;
	}
}
`, port, port))
	return b.with(v1.Config{
		Env:          []string{searchPath},
		Cmd:          []string{"nginx", "-g", "daemon off;"},
		ExposedPorts: map[string]struct{}{fmt.Sprintf("%d/tcp", port): {}},
		StopSignal:   "SIGQUIT",
	}, l)
}

// apache is httpd under its upstream name and place; it logs how it was called.
func apache(root string, b *base) (v1.Image, error) {
	const home, modules = "/usr/local/apache2", "/usr/lib/apache2/modules"
	l := &Layer{}
	files, err := closure(root, "/usr/sbin/apache2")
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		if file == "/usr/sbin/apache2" {
			err = l.CopyAs(root, file, home+"/bin/httpd")
		} else {
			err = l.Copy(root, file)
		}
		if err != nil {
			return nil, err
		}
	}
	for _, module := range []string{"mod_mpm_prefork.so", "mod_authz_core.so", "mod_dir.so"} {
		if err := l.CopyAs(root, modules+"/"+module, home+"/modules/"+module); err != nil {
			return nil, err
		}
	}
	l.File(home+"/htdocs/index.html", 0o644, "<html><body>It works!</body></html>\n")
	l.File(home+"/conf/httpd.conf", 0o644, `ServerRoot /usr/local/apache2
ServerName localhost
Listen 80
PidFile /run/httpd.pid
StartServers 1
DefaultRuntimeDir /run
LoadModule mpm_prefork_module modules/mod_mpm_prefork.so
LoadModule authz_core_module modules/mod_authz_core.so
LoadModule dir_module modules/mod_dir.so
User www-data
Group www-data
DocumentRoot /usr/local/apache2/htdocs
DirectoryIndex index.html
ErrorLog /proc/self/fd/2
`)
	return b.with(v1.Config{
		Env:          []string{"PATH=" + home + "/bin:" + strings.TrimPrefix(searchPath, "PATH=")},
		Cmd:          []string{"httpd", "-D", "FOREGROUND", "-f", home + "/conf/httpd.conf"},
		WorkingDir:   home,
		ExposedPorts: map[string]struct{}{"80/tcp": {}},
		StopSignal:   "SIGWINCH",
	}, l)
}

// pause does nothing, in one static program.
func pause(root string) (v1.Image, error) {
	l := &Layer{}
	if err := l.CopyAs(root, "/usr/bin/catatonit", "/pause"); err != nil {
		return nil, err
	}
	layer, err := l.Build(compression.GZip)
	if err != nil {
		return nil, err
	}
	return image(v1.Config{Env: []string{searchPath}, Entrypoint: []string{"/pause", "-P"}}, types.DockerManifestSchema2, layer)
}
