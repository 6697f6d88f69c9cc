package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// hostOptions say where a runtime's things are. Nothing named, nothing checked.
type hostOptions struct {
	Folders, Links, Cgroup, NftTable, PIDs string
}

// host is what a runtime has on the machine: what it is, and how often.
type host map[string]int

// spare is how many descriptors more than before a process may hold: a
// connection that is about to go, a folder that is being read.
const spare = 8

// beyond lists what h has more than before.
func (h host) beyond(before host) (left []string) {
	for what, n := range h {
		limit := before[what]
		if strings.HasPrefix(what, "descriptor") {
			limit += spare
		}
		if n > limit {
			left = append(left, fmt.Sprintf("%s (%d, before %d)", what, n, before[what]))
		}
	}
	slices.Sort(left)
	return left
}

func takeHost(o hostOptions) (host, error) {
	h := host{}
	if o.Folders != "" {
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return nil, err
		}
		for _, p := range parseMounts(b) {
			for _, dir := range strings.Split(o.Folders, ",") {
				if strings.HasPrefix(p, dir+"/") {
					h["mount "+p]++
				}
			}
		}
	}
	if o.Links != "" {
		// By netlink: /sys is that of the namespace it was mounted in.
		links, err := net.Interfaces()
		if err != nil {
			return nil, err
		}
		for _, l := range links {
			if strings.HasPrefix(l.Name, o.Links) {
				h["link "+l.Name]++
			}
		}
	}
	if o.Cgroup != "" {
		h.cgroups(o.Cgroup)
	}
	if o.NftTable != "" {
		out, err := exec.Command("nft", "-j", "list", "table", "inet", o.NftTable).Output()
		if err != nil {
			return nil, fmt.Errorf("list nftables table %s: %w", o.NftTable, err)
		}
		sets, err := parseNft(out)
		if err != nil {
			return nil, err
		}
		for set, n := range sets {
			h["elements of nftables set "+set] = n
		}
	}
	if o.PIDs != "" {
		for _, s := range strings.Split(o.PIDs, ",") {
			fds, err := os.ReadDir("/proc/" + s + "/fd")
			if err != nil {
				continue // it was killed; the next one is not known
			}
			h["descriptors of process "+s] = len(fds)
		}
	}
	return h, nil
}

// cgroups notes the cgroups below name in each hierarchy, and their processes.
func (h host) cgroups(name string) {
	tops, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	if _, err := os.Stat("/sys/fs/cgroup/" + name); err == nil {
		tops = append(tops, "/sys/fs/cgroup/"+name)
	}
	for _, top := range tops {
		_ = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil
			}
			if p != top {
				h["cgroup "+p]++
			}
			b, _ := os.ReadFile(p + "/cgroup.procs")
			for _, pid := range strings.Fields(string(b)) {
				h["process "+pid+" in "+p]++
			}
			return nil
		})
	}
}

// parseMounts reads the mount points from proc_pid_mountinfo(5).
func parseMounts(b []byte) (points []string) {
	for line := range bytes.Lines(b) {
		if f := bytes.Fields(line); len(f) > 4 {
			points = append(points, unescape(string(f[4])))
		}
	}
	return points
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// parseNft counts the elements of each set and map in what nft -j prints.
func parseNft(b []byte) (map[string]int, error) {
	type set struct {
		Name string            `json:"name"`
		Elem []json.RawMessage `json:"elem"`
	}
	var out struct {
		Nftables []struct {
			Set *set `json:"set"`
			Map *set `json:"map"`
		} `json:"nftables"`
	}
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, fmt.Errorf("read what nft says: %w", err)
	}
	n := map[string]int{}
	for _, o := range out.Nftables {
		for _, s := range []*set{o.Set, o.Map} {
			if s != nil {
				n[s.Name] += len(s.Elem)
			}
		}
	}
	return n, nil
}
