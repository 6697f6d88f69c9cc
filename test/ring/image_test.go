package ring

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/naru-project/naru/internal/admin"
)

// Entry is one member of a layer, exactly as given: names may be absolute, may
// climb, may come twice.
type Entry struct {
	Name string
	Type byte // tar type flag; 0 = regular file, or folder when Name ends in "/"
	Mode int64
	UID  int64
	GID  int64
	Link string
	Data []byte
	// PAX records that go before the member, such as
	// "SCHILY.xattr.security.capability".
	PAX map[string]string
	// Major and Minor of a device.
	Major, Minor int64
}

// File, Dir and Symlink make the usual entries.
func File(name string, mode int64, data string) Entry {
	return Entry{Name: name, Mode: mode, Data: []byte(data)}
}

// Dir is a folder with mode 0755.
func Dir(name string) Entry { return Entry{Name: strings.TrimSuffix(name, "/") + "/", Mode: 0o755} }

// Symlink is a symbolic link.
func Symlink(name, to string) Entry { return Entry{Name: name, Type: '2', Mode: 0o777, Link: to} }

// ImageConfig is the config part of an image's configuration document.
type ImageConfig struct {
	User         string              `json:",omitempty"`
	Env          []string            `json:",omitempty"`
	Entrypoint   []string            `json:",omitempty"`
	Cmd          []string            `json:",omitempty"`
	Volumes      map[string]struct{} `json:",omitempty"`
	WorkingDir   string              `json:",omitempty"`
	Labels       map[string]string   `json:",omitempty"`
	StopSignal   string              `json:",omitempty"`
	ExposedPorts map[string]struct{} `json:",omitempty"`
}

// tarball writes entries with a writer of its own: archive/tar refuses what an
// attacker writes.
func tarball(entries []Entry) []byte {
	var b bytes.Buffer
	for _, e := range entries {
		if e.Type == 0 {
			e.Type = '0'
			if strings.HasSuffix(e.Name, "/") {
				e.Type = '5'
			}
		}
		pax := map[string]string{}
		for k, v := range e.PAX {
			pax[k] = v
		}
		if len(e.Name) > 100 {
			pax["path"] = e.Name
		}
		if len(e.Link) > 100 {
			pax["linkpath"] = e.Link
		}
		if len(pax) > 0 {
			var records []byte
			for k, v := range pax {
				records = append(records, paxRecord(k, v)...)
			}
			writeMember(&b, Entry{Name: "pax", Type: 'x', Mode: 0o644, Data: records})
		}
		writeMember(&b, e)
	}
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

func paxRecord(k, v string) string {
	n := len(k) + len(v) + 3
	for len(strconv.Itoa(n))+len(k)+len(v)+3 != n {
		n = len(strconv.Itoa(n)) + len(k) + len(v) + 3
	}
	return fmt.Sprintf("%d %s=%s\n", n, k, v)
}

func writeMember(b *bytes.Buffer, e Entry) {
	var h [512]byte
	put := func(at, size int, s string) { copy(h[at:at+size], s) }
	octal := func(at, size int, v int64) { put(at, size, fmt.Sprintf("%0*o", size-1, v)) }
	put(0, 100, e.Name)
	octal(100, 8, e.Mode)
	octal(108, 8, e.UID)
	octal(116, 8, e.GID)
	octal(124, 12, int64(len(e.Data)))
	octal(136, 12, 1700000000)
	put(148, 8, "        ")
	h[156] = e.Type
	put(157, 100, e.Link)
	put(257, 8, "ustar\x0000")
	octal(329, 8, e.Major)
	octal(337, 8, e.Minor)
	sum := int64(0)
	for _, c := range h {
		sum += int64(c)
	}
	put(148, 8, fmt.Sprintf("%06o\x00 ", sum))
	b.Write(h[:])
	b.Write(e.Data)
	b.Write(make([]byte, (512-len(e.Data)%512)%512))
}

// dockerArchive packs one image of the given layers as docker save does.
func dockerArchive(name string, cfg ImageConfig, layers ...[]byte) []byte {
	type rootfs struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	doc := struct {
		Architecture string      `json:"architecture"`
		OS           string      `json:"os"`
		Config       ImageConfig `json:"config"`
		RootFS       rootfs      `json:"rootfs"`
	}{"amd64", "linux", cfg, rootfs{Type: "layers"}}
	var members []Entry
	var names []string
	for _, l := range layers {
		sum := sha256.Sum256(l)
		id := hex.EncodeToString(sum[:])
		doc.RootFS.DiffIDs = append(doc.RootFS.DiffIDs, "sha256:"+id)
		names = append(names, id+".tar")
		members = append(members, Entry{Name: id + ".tar", Mode: 0o644, Data: l})
	}
	config := must(json.Marshal(doc))
	sum := sha256.Sum256(config)
	configName := hex.EncodeToString(sum[:]) + ".json"
	manifest := must(json.Marshal([]map[string]any{{"Config": configName, "RepoTags": []string{name}, "Layers": names}}))
	members = append(members, Entry{Name: configName, Mode: 0o644, Data: config}, Entry{Name: "manifest.json", Mode: 0o644, Data: manifest})
	return tarball(members)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Busybox is the image that every node has: busybox with links for its
// applets, /bin/evil (testdata/evil.c) and a few users.
const Busybox = "ring.test/busybox:1"

// busyboxLayer is the layer of that image.
var busyboxLayer = sync.OnceValue(func() []byte {
	bin := must(exec.LookPath("busybox"))
	list := must(exec.Command(bin, "--list").Output())
	entries := []Entry{
		Dir("bin"), Dir("etc"), Dir("proc"), Dir("sys"), Dir("dev"), Dir("root"), Dir("home"), Dir("mnt"), Dir("run"), Dir("var"), Dir("usr"),
		{Name: "tmp/", Mode: 0o1777},
		{Name: "bin/busybox", Mode: 0o755, Data: must(os.ReadFile(bin))},
		{Name: "bin/evil", Mode: 0o755, Data: must(os.ReadFile(evilBin))},
		File("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"),
		File("etc/group", 0o644, "root:x:0:\napp:x:1000:\nextra:x:2000:app\nnobody:x:65534:\n"),
	}
	for applet := range strings.FieldsSeq(string(list)) {
		if applet != "busybox" {
			entries = append(entries, Symlink("bin/"+applet, "busybox"))
		}
	}
	return tarball(entries)
})

// Image makes an image of the default one's files and, in a layer above, the
// given entries; loads it and returns its name.
func (n *Node) Image(t testing.TB, cfg ImageConfig, entries ...Entry) string {
	t.Helper()
	name, err := n.TryImage(t, cfg, entries...)
	if err != nil {
		t.Fatalf("load image: %v", err)
	}
	return name
}

// TryImage is Image, for layers that may be refused.
func (n *Node) TryImage(t testing.TB, cfg ImageConfig, entries ...Entry) (string, error) {
	t.Helper()
	name := "ring.test/" + newID()[:12] + ":1"
	layers := [][]byte{busyboxLayer()}
	if len(entries) > 0 {
		layers = append(layers, tarball(entries))
	}
	return name, n.LoadArchive(t, dockerArchive(name, cfg, layers...))
}

// LoadArchive loads a docker archive or an OCI layout by the admin socket.
func (n *Node) LoadArchive(t testing.TB, archive []byte) error {
	t.Helper()
	_, err := admin.NewClient(n.RunDir+"/admin.sock").Load(within(t, callTime), bytes.NewReader(archive), "", nil)
	return err
}

// busyboxArchive is the default image, packed once.
var busyboxArchive = sync.OnceValue(func() []byte {
	return dockerArchive(Busybox, ImageConfig{Cmd: []string{"sh"}, Env: []string{"PATH=/bin"}}, busyboxLayer())
})
