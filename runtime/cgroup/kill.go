package cgroup

import (
	"context"
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// maxPidsListed bounds Procs; more tasks than that do not fit a default host.
const maxPidsListed = 1 << 20

// freezeWait bounds how long Freeze waits when its caller sets no deadline.
const freezeWait = 10 * time.Second

// Kill ends every process of the group and below. With cgroup.kill (kernel
// ≥ 5.14, version 2 tree) that is one write which also reaches what forks
// meanwhile, and Kill does not wait for the exits. Without it each process is
// signalled by pidfd, round by round, until none is left or ctx ends. Frozen
// groups are thawed: a version 1 freezer holds back even SIGKILL.
func (g *Group) Kill(ctx context.Context) error {
	if g.d.unified != nil {
		if writeAt(g.d.unified.fd, g.rel+"/cgroup.kill", "1") == nil {
			g.thawAll(ctx)
			return nil
		}
		if !exists(g.d.unified.fd, g.rel) {
			return nil
		}
	}
	return g.killEach(ctx)
}

// killEach is Kill without cgroup.kill. Freezing first stops forks, where the
// freezer is there.
func (g *Group) killEach(ctx context.Context) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		_ = g.setFreezerV1("FROZEN") // without a freezer the rounds do it
		pids, err := g.Procs()
		if err != nil {
			g.thawAll(ctx)
			return err
		}
		for _, pid := range pids {
			g.killOne(pid)
		}
		g.thawAll(ctx)
		if len(pids) == 0 {
			return nil
		}
		if err := pause(ctx, wait); err != nil {
			return errs.New(errs.Of(err), "kill cgroup %s: %d processes are left, %d …: %w", g.Path, len(pids), pids[0], err)
		}
	}
}

// killOne signals pid if, with the pidfd held, it still is in the group: so a
// reused pid is never hit.
func (g *Group) killOne(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if g.contains(pid) {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

func (g *Group) contains(pid int) bool {
	// The path is as this process sees it; the root of the hierarchy may be a
	// folder of it (tests, nested runtimes).
	path, ok := g.d.tracking().pathOf(pid)
	return ok && strings.Contains(path+"/", g.Path+"/")
}

// pathOf is the cgroup of a process in h, from proc_pid_cgroup(5).
func (h *hierarchy) pathOf(pid int) (path string, ok bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return "", false
	}
	for line := range strings.Lines(string(b)) {
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		name, path, _ := strings.Cut(rest, ":")
		if h.v2 == (name == "") && (h.v2 || name == h.name) {
			return path, true
		}
	}
	return "", false
}

// Find returns the path of container id's group, in which or below which
// process pid is: for one whose record is lost. It is "" where there is none.
func (d *Driver) Find(pid int, id string) string {
	h := d.tracking()
	path, _ := h.pathOf(pid)
	parts := strings.Split(path, "/")
	end := slices.Index(parts, d.groupName(id)) // the outermost: below it the container makes names
	for begin := range end + 1 {                // the root of the hierarchy may be a folder of the path
		if p := strings.Join(parts[begin:end+1], "/"); p != "" && p[0] != '/' && exists(h.fd, p) {
			return "/" + p
		}
	}
	return ""
}

// Procs lists the processes of the group and below, in no order. Of a threaded
// group, which has threads only, it lists those.
func (g *Group) Procs() ([]int, error) {
	return listPids(context.Background(), g.d.tracking(), g.rel, true)
}

// Processes lists the processes of the group at path and below, none of their
// threads, for counting them.
func (d *Driver) Processes(ctx context.Context, path string) ([]int, error) {
	g, err := d.Open(path)
	if err != nil {
		return nil, err
	}
	return listPids(ctx, d.tracking(), g.rel, false)
}

// listPids walks the tree below rel. Folders that vanish meanwhile are skipped;
// the walk is bounded by the number of pids and of folders. A threaded group
// refuses to list processes: theirs are listed by the domain above it.
func listPids(ctx context.Context, h *hierarchy, rel string, threads bool) ([]int, error) {
	var pids []int
	dirs := []string{rel}
	for n := 0; len(dirs) > 0 && n < maxRemoved; n++ {
		dir := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		if err := ctx.Err(); err != nil {
			return pids, errs.New(errs.Of(err), "list processes of /%s: %w", rel, context.Cause(ctx))
		}
		var err error
		pids, err = appendPids(pids, h.fd, dir+"/cgroup.procs")
		if errors.Is(err, unix.EOPNOTSUPP) {
			if err = nil; threads {
				pids, err = appendPids(pids, h.fd, dir+"/cgroup.threads")
			}
		}
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENAMETOOLONG) {
			continue
		}
		if err != nil {
			return pids, classify(err, "list processes of /%s", dir)
		}
		if len(pids) > maxPidsListed {
			return pids, errs.New(errs.ResourceExhausted, "list processes of /%s: more than %d", rel, maxPidsListed)
		}
		names, err := subdirs(h.fd, dir, maxRemoved)
		if err != nil {
			continue
		}
		for _, name := range names {
			dirs = append(dirs, dir+"/"+name)
		}
	}
	return pids, nil
}

// appendPids reads one pid file in pieces, however long it is.
func appendPids(pids []int, dir int, file string) ([]int, error) {
	fd, err := openAt(dir, file, unix.O_RDONLY)
	if err != nil {
		return pids, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	pid := 0
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return pids, err
		}
		for _, c := range buf[:n] {
			switch {
			case c >= '0' && c <= '9' && pid < 1<<30:
				pid = pid*10 + int(c-'0')
			case pid != 0: // 0 is a process of another pid namespace
				pids = append(pids, pid)
				pid = 0
			}
		}
	}
}

// Freeze stops every process of the group and returns when all have stopped.
func (g *Group) Freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, freezeWait)
	defer cancel()
	set, done := g.setFreezerV1, g.frozenV1
	if g.d.mode == ModeV2 {
		set, done = g.setFreezerV2, g.frozenV2
	}
	for {
		if err := set("FROZEN"); err != nil {
			return classify(err, "freeze cgroup %s", g.Path)
		}
		if done() {
			return nil
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			g.thawAll(context.WithoutCancel(ctx))
			return errs.New(errs.Of(err), "freeze cgroup %s: %w", g.Path, err)
		}
	}
}

// Thaw lets them go on.
func (g *Group) Thaw(_ context.Context) error {
	set := g.setFreezerV1
	if g.d.mode == ModeV2 {
		set = g.setFreezerV2
	}
	if err := set("THAWED"); err != nil {
		return classify(err, "thaw cgroup %s", g.Path)
	}
	return nil
}

// thawAll undoes every freeze that holds back a SIGKILL, the container's own
// included: a version 1 freezer anywhere below. cgroup.kill needs no thaw.
func (g *Group) thawAll(ctx context.Context) {
	h := g.d.control["freezer"]
	if h == nil || h.v2 {
		return
	}
	_ = writeAt(h.fd, g.rel+"/freezer.state", "THAWED")
	dirs := []string{g.rel}
	for i := 0; i < len(dirs) && i < maxRemoved && ctx.Err() == nil; i++ {
		names, _ := subdirs(h.fd, dirs[i], maxRemoved)
		for _, name := range names {
			sub := dirs[i] + "/" + name
			_ = writeAt(h.fd, sub+"/freezer.state", "THAWED")
			dirs = append(dirs, sub)
		}
	}
}

func (g *Group) setFreezerV1(state string) error {
	h := g.d.control["freezer"]
	if h == nil {
		return unix.EOPNOTSUPP
	}
	return writeAt(h.fd, g.rel+"/freezer.state", state)
}

func (g *Group) frozenV1() bool {
	s, err := readStringAt(g.d.control["freezer"].fd, g.rel+"/freezer.state")
	return err == nil && s == "FROZEN"
}

func (g *Group) setFreezerV2(state string) error {
	v := "0"
	if state == "FROZEN" {
		v = "1"
	}
	return writeAt(g.d.unified.fd, g.rel+"/cgroup.freeze", v)
}

func (g *Group) frozenV2() bool {
	b, err := readAt(g.d.unified.fd, g.rel+"/cgroup.events")
	n, ok := keyed(b, "frozen")
	return err == nil && ok && n == 1
}
