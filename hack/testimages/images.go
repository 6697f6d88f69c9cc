package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The names that critest v1.36.0 asks for. They reach the local registry
// through a mirror; nothing is fetched from the public ones.
const (
	e2e     = "registry.k8s.io/e2e-test-images/"
	staging = "gcr.io/k8s-staging-cri-tools/"
)

// Names of the demo's images, of the benchmark's, and of the one that no pod uses.
const (
	demoNginx    = "localhost/demo/nginx:1"
	demoBusybox  = "localhost/demo/busybox:1"
	benchBusybox = "localhost/cribench/busybox:1"
	benchPause   = "localhost/cribench/pause:1"
	unusedImage  = "localhost/kubelet/unused:1"
)

// named is an image with the reference it is stored under.
type named struct {
	ref   string
	image v1.Image
}

// maker builds sets of images.
type maker struct {
	debian *debian
	dir    string // cache of built programs
}

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// image makes an image of layers; config's Env, and the platform, are filled in.
func image(config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	img, err := mutate.AppendLayers(img, layers...)
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	config.Env = append([]string{searchPath}, config.Env...)
	file.Config, file.OS, file.Architecture = config, "linux", runtime.GOARCH
	file.Created, file.History = v1.Time{Time: epoch}, nil
	return mutate.ConfigFile(img, file)
}

// baseTree is what every image with a shell starts from.
func baseTree() tree {
	t := tree{}
	t.dir("/bin", "/dev", "/etc", "/home", "/proc", "/root", "/run", "/sbin", "/sys", "/usr/bin", "/usr/sbin", "/var/log", "/var/run")
	t["/root"] = entry{mode: fs.ModeDir | 0o700}
	t["/tmp"] = entry{mode: fs.ModeDir | fs.ModeSticky | 0o777}
	t.text("/etc/passwd", strings.Join([]string{
		"root:x:0:0:root:/root:/bin/sh",
		"daemon:x:1:1:daemon:/usr/sbin:/bin/false",
		"www-data:x:33:33:www-data:/var/www:/bin/false",
		"nobody:x:65534:65534:nobody:/home:/bin/false", ""}, "\n"))
	t.text("/etc/group", strings.Join([]string{
		"root:x:0:", "daemon:x:1:", "www-data:x:33:", "users:x:100:", "nobody:x:65534:", ""}, "\n"))
	return t
}

// busyboxLayer is the base with busybox in it.
func (m *maker) busyboxLayer(ctx context.Context, binary string, want []string) (v1.Layer, error) {
	t := baseTree()
	if err := addBusybox(ctx, m.debian, t, binary, want); err != nil {
		return nil, err
	}
	return t.layer()
}

// packagedBusybox returns the binary of Debian's busybox-static.
func (m *maker) packagedBusybox(ctx context.Context) (string, error) {
	root := filepath.Join(m.debian.path("root"), "busybox-static")
	if _, err := m.debian.unpack(ctx, root, "busybox-static"); err != nil {
		return "", err
	}
	for _, name := range []string{"bin/busybox", "usr/bin/busybox"} { // before and after Debian 13
		if file := filepath.Join(root, name); isFile(file) {
			return file, nil
		}
	}
	return "", errors.New("busybox-static has no busybox")
}

// nginxLayer is Debian's nginx with its libraries and a plain configuration.
func (m *maker) nginxLayer(ctx context.Context, port int, page string) (v1.Layer, error) {
	t := tree{}
	if err := m.debian.program(ctx, t, "nginx", "/usr/sbin/nginx"); err != nil {
		return nil, err
	}
	t.text("/etc/nginx/nginx.conf", fmt.Sprintf(`daemon off;
user root;
worker_processes 1;
pid /var/run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 64; }
http {
  access_log /dev/stdout;
  client_body_temp_path /tmp/nginx-body;
  proxy_temp_path /tmp/nginx-proxy;
  fastcgi_temp_path /tmp/nginx-fastcgi;
  uwsgi_temp_path /tmp/nginx-uwsgi;
  scgi_temp_path /tmp/nginx-scgi;
  server {
    listen %[1]d;
    listen [::]:%[1]d;
    root /usr/share/nginx/html;
  }
}
`, port))
	t.text("/usr/share/nginx/html/index.html", page)
	t.dir("/var/log/nginx", "/var/lib/nginx")
	return t.layer()
}

var nginxConfig = v1.Config{Cmd: []string{"nginx"}, ExposedPorts: map[string]struct{}{"80/tcp": {}}, StopSignal: "SIGQUIT"}

// demo makes the two images of the demo from binary packages alone.
func (m *maker) demo(ctx context.Context) ([]named, error) {
	specs, _, err := m.demoSpecs(ctx)
	if err != nil {
		return nil, err
	}
	return assemble(specs...)
}

// kubelet makes the images of kubelet-e2e: the demo's, those with a user, and
// one that no pod uses.
func (m *maker) kubelet(ctx context.Context) ([]named, error) {
	specs, base, err := m.demoSpecs(ctx)
	if err != nil {
		return nil, err
	}
	users, err := m.users(ctx, base)
	if err != nil {
		return nil, err
	}
	t := tree{}
	t.text("/which", "unused\n")
	unused, err := t.layer()
	if err != nil {
		return nil, err
	}
	specs = append(specs, spec{unusedImage, v1.Config{Cmd: []string{"sh"}}, []v1.Layer{base, unused}})
	return assemble(append(specs, users...)...)
}

func (m *maker) demoSpecs(ctx context.Context) (specs []spec, base v1.Layer, err error) {
	binary, err := m.packagedBusybox(ctx)
	if err != nil {
		return nil, nil, err
	}
	if base, err = m.busyboxLayer(ctx, binary, []string{"sh", "wget", "sleep", "cat", "ls", "hostname"}); err != nil {
		return nil, nil, err
	}
	nginx, err := m.nginxLayer(ctx, 80, "<h1>Hello from a pod</h1>\n")
	if err != nil {
		return nil, nil, err
	}
	return []spec{
		{demoBusybox, v1.Config{Cmd: []string{"sh"}}, []v1.Layer{base}},
		{demoNginx, nginxConfig, []v1.Layer{base, nginx}},
	}, base, nil
}

// bench makes the images of the benchmark and of its containerd fixture.
func (m *maker) bench(ctx context.Context) ([]named, error) {
	binary, err := m.packagedBusybox(ctx)
	if err != nil {
		return nil, err
	}
	base, err := m.busyboxLayer(ctx, binary, []string{"sh", "sleep", "true", "yes", "head", "cat"})
	if err != nil {
		return nil, err
	}
	pause, err := m.pauseLayer(ctx)
	if err != nil {
		return nil, err
	}
	return assemble(
		spec{benchBusybox, v1.Config{Cmd: []string{"sh"}}, []v1.Layer{base}},
		spec{benchPause, v1.Config{Entrypoint: []string{"/pause"}}, []v1.Layer{pause}})
}

func (m *maker) pauseLayer(ctx context.Context) (v1.Layer, error) {
	file, err := compiled(ctx, m.dir, "pause")
	if err != nil {
		return nil, err
	}
	t := tree{}
	t.dir("/dev", "/etc", "/proc", "/sys")
	if err := t.copyIn("/pause", file); err != nil {
		return nil, err
	}
	return t.layer()
}

// spec is an image before it is assembled.
type spec struct {
	ref    string
	config v1.Config
	layers []v1.Layer
}

func assemble(specs ...spec) ([]named, error) {
	var out []named
	for _, s := range specs {
		img, err := image(s.config, s.layers...)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.ref, err)
		}
		out = append(out, named{s.ref, img})
	}
	return out, nil
}

// critest makes every image that critest v1.36.0 pulls.
func (m *maker) critest(ctx context.Context) ([]named, error) {
	binary, err := builtBusybox(ctx, m.debian, m.dir)
	if err != nil {
		return nil, err
	}
	base, err := m.busyboxLayer(ctx, binary, applets)
	if err != nil {
		return nil, err
	}
	var specs []spec
	for _, part := range []func(context.Context, v1.Layer) ([]spec, error){
		m.servers, m.small, m.users, m.numbered,
	} {
		s, err := part(ctx, base)
		if err != nil {
			return nil, err
		}
		specs = append(specs, s...)
	}
	return assemble(append(specs, spec{e2e + "busybox:1.29-2", v1.Config{Cmd: []string{"sh"}}, []v1.Layer{base}})...)
}

// servers are the images that answer on a port.
func (m *maker) servers(ctx context.Context, base v1.Layer) ([]spec, error) {
	nginx, err := m.nginxLayer(ctx, 80, "<h1>Welcome to nginx!</h1>\n")
	if err != nil {
		return nil, err
	}
	hostNginx, err := m.nginxLayer(ctx, 12003, "<h1>Welcome to nginx!</h1>\n")
	if err != nil {
		return nil, err
	}
	t := tree{}
	t.text("/www/index.html", "<h1>It works!</h1>\n")
	t.file("/usr/local/bin/httpd-foreground", 0o755,
		[]byte("#!/bin/sh\necho 'httpd: serving /www on port 80'\nexec httpd -f -v -p 80 -h /www\n"))
	httpd, err := t.layer()
	if err != nil {
		return nil, err
	}
	hostConfig := nginxConfig
	hostConfig.ExposedPorts = map[string]struct{}{"12003/tcp": {}}
	return []spec{
		{e2e + "nginx:1.14-2", nginxConfig, []v1.Layer{base, nginx}},
		{staging + "hostnet-nginx-" + runtime.GOARCH + ":latest", hostConfig, []v1.Layer{base, hostNginx}},
		{e2e + "httpd:2.4.39-4", v1.Config{Cmd: []string{"httpd-foreground"}}, []v1.Layer{base, httpd}},
	}, nil
}

// small are the images made of one C program.
func (m *maker) small(ctx context.Context, base v1.Layer) ([]spec, error) {
	pause, err := m.pauseLayer(ctx)
	if err != nil {
		return nil, err
	}
	file, err := compiled(ctx, m.dir, "nonewprivs")
	if err != nil {
		return nil, err
	}
	t := tree{}
	if err := t.copyIn("/nnp", file); err != nil {
		return nil, err
	}
	e := t["/nnp"]
	e.mode = fs.ModeSetuid | 0o755
	t["/nnp"] = e
	nnp, err := t.layer()
	if err != nil {
		return nil, err
	}
	return []spec{
		{"registry.k8s.io/pause:3.9", v1.Config{Entrypoint: []string{"/pause"}}, []v1.Layer{pause}},
		{"k8s.gcr.io/pause:3.9", v1.Config{Entrypoint: []string{"/pause"}}, []v1.Layer{pause}},
		{e2e + "nonewprivs:1.3", v1.Config{Entrypoint: []string{"/nnp"}}, []v1.Layer{base, nnp}},
	}, nil
}

// users are the images that say who their process runs as.
func (m *maker) users(_ context.Context, base v1.Layer) ([]spec, error) {
	sh := []string{"sh"}
	var specs []spec
	for name, user := range map[string]string{
		"user-uid": "1002", "user-username": "www-data",
		"user-uid-group": "1003:1004", "user-username-group": "www-data:1004",
	} {
		specs = append(specs, spec{staging + "test-image-" + name + ":latest", v1.Config{Cmd: sh, User: user}, []v1.Layer{base}})
	}
	t := baseTree()
	t.text("/etc/passwd", string(t["/etc/passwd"].data)+"default-user:x:1000:1000::/home/default-user:/bin/sh\n")
	t.text("/etc/group", string(t["/etc/group"].data)+"default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
	group, err := tree{"/etc/passwd": t["/etc/passwd"], "/etc/group": t["/etc/group"]}.layer()
	if err != nil {
		return nil, err
	}
	return append(specs, spec{staging + "test-image-predefined-group:latest", v1.Config{Cmd: sh, User: "1000"}, []v1.Layer{base, group}}), nil
}

// numbered are the images that only have to differ, or to be the same.
func (m *maker) numbered(_ context.Context, base v1.Layer) ([]spec, error) {
	content := map[string]string{}
	for _, name := range []string{"1:latest", "2:latest", "3:latest", "latest:latest", "digest:latest", "tag:test", "tag:all"} {
		content[name] = name
	}
	for _, tag := range []string{"tags:1", "tags:2", "tags:3"} {
		content[tag] = "tags"
	}
	var specs []spec
	for name, text := range content {
		t := tree{}
		t.text("/which", text+"\n")
		l, err := t.layer()
		if err != nil {
			return nil, err
		}
		specs = append(specs, spec{staging + "test-image-" + name, v1.Config{Cmd: []string{"sh"}}, []v1.Layer{base, l}})
	}
	return specs, nil
}

// padding makes an image of incompressible layers, to measure pulls with.
func padding(ref string, mb, layers int, seed uint64) (named, error) {
	var all []v1.Layer
	for i := range layers {
		data := make([]byte, mb*1_000_000/layers)
		var key [32]byte
		copy(key[:], fmt.Sprintf("%d-%d", seed, i))
		if _, err := rand.NewChaCha8(key).Read(data); err != nil {
			return named{}, err
		}
		t := tree{}
		t.file(fmt.Sprintf("/pad%d", i), 0o644, data)
		l, err := t.layer()
		if err != nil {
			return named{}, err
		}
		all = append(all, l)
	}
	img, err := image(v1.Config{}, all...)
	return named{ref, img}, err
}
