package spec

import (
	"math"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

const (
	maxGroups = 65536 // NGROUPS_MAX
	maxName   = 256   // LOGIN_NAME_MAX
)

// identity is who the first process runs as.
type identity struct {
	runtime.User
	home string
}

// request is the user that is asked for, before the image's files are read.
type request struct {
	uid   *uint32
	name  string // when uid is nil
	gid   *uint32
	group string // when gid is nil; empty = the account's own
}

// user resolves the identity of the first process.
func (b *builder) user() error {
	req, err := requested(&b.in.Security, b.in.Image.User)
	if err != nil {
		return err
	}
	if b.who, err = resolve(b.in.Root, req, &b.in.Security); err != nil {
		return err
	}
	if err := b.mapped(); err != nil {
		return err
	}
	b.spec.Process.User = specs.User{
		UID: b.who.UID, GID: b.who.GID, AdditionalGids: slices.Clone(b.who.Groups), Umask: new(uint32(0o022)),
	}
	return nil
}

// requested reads the fields of the security context (api.proto,
// LinuxContainerSecurityContext) or, where they say nothing, the image's USER.
func requested(s *runtime.Security, image string) (r request, err error) {
	switch {
	case s.RunAsUser != nil && s.RunAsUsername != "":
		return r, errs.New(errs.InvalidArgument, "run_as_user and run_as_username exclude each other")
	case s.RunAsGroup != nil && s.RunAsUser == nil && s.RunAsUsername == "":
		return r, errs.New(errs.InvalidArgument, "run_as_group needs run_as_user or run_as_username")
	case s.RunAsUser != nil:
		if r.uid, err = id("run_as_user", *s.RunAsUser); err != nil {
			return r, err
		}
	case s.RunAsUsername != "":
		if _, numeric, _ := ParseID(s.RunAsUsername); numeric || !validName(s.RunAsUsername) {
			return r, errs.New(errs.InvalidArgument, "run_as_username %q: not a user name", clip(s.RunAsUsername))
		}
		r.name = s.RunAsUsername
	default:
		return imageUser(image)
	}
	if s.RunAsGroup != nil {
		r.gid, err = id("run_as_group", *s.RunAsGroup)
	}
	return r, err
}

// imageUser reads USER of an image: user, uid, user:group, uid:gid, uid:group
// or user:gid (image-spec, config.md). Empty is root.
func imageUser(s string) (r request, err error) {
	if s == "" {
		return request{uid: new(uint32)}, nil
	}
	bad := errs.New(errs.InvalidArgument, "USER %q of the image: want user or uid, and perhaps :group or :gid, up to %d", clip(s), MaxID)
	user, group, _ := strings.Cut(s, ":")
	if r.uid, r.name, err = idOrName(user); err != nil {
		return request{}, bad
	}
	if group != "" {
		if r.gid, r.group, err = idOrName(group); err != nil {
			return request{}, bad
		}
	}
	return r, nil
}

// idOrName reads one half of USER.
func idOrName(s string) (id *uint32, name string, err error) {
	n, numeric, err := ParseID(s)
	switch {
	case err != nil:
		return nil, "", err
	case numeric:
		return &n, "", nil
	case !validName(s):
		return nil, "", errs.New(errs.InvalidArgument, "%q is not a name", clip(s))
	}
	return nil, s, nil
}

// validName accepts the names that can stand in passwd and group and could be
// meant as such: printable ASCII without blanks, ':' and ','.
func validName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' || c == ':' || c == ',' {
			return false
		}
	}
	return true
}

func id(field string, v int64) (*uint32, error) {
	if v < 0 || v > MaxID {
		return nil, errs.New(errs.InvalidArgument, "%s %d: want 0 to %d", field, v, MaxID)
	}
	return new(uint32(v)), nil
}

// resolve reads the image's accounts, once.
func resolve(root Root, r request, s *runtime.Security) (who identity, err error) {
	acc, err := lookup(root, r)
	if err != nil {
		return who, err
	}
	who.home = "/"
	member := ""
	if acc != nil {
		who.UID, who.GID, member = acc.uid, acc.gid, acc.name
		if acc.home != "" {
			who.home = acc.home
		}
	} else {
		who.UID = *r.uid
	}
	if s.GroupsPolicyStrict {
		member = "" // only what the request lists
	}
	var of []uint32
	if r.group != "" || member != "" {
		var gid *uint32
		if gid, of, err = groups(root, r.group, member); err != nil {
			return who, err
		}
		if gid != nil {
			who.GID = *gid
		}
	}
	if r.gid != nil {
		who.GID = *r.gid
	}
	who.Groups, err = groupSet(who.GID, of, s.SupplementalGroups)
	return who, err
}

// lookup finds the account. A uid needs none.
func lookup(root Root, r request) (*account, error) {
	f, err := openAccounts(root, "/etc/passwd")
	if err != nil {
		return nil, err
	}
	var acc *account
	if f != nil {
		defer f.Close()
		uid := uint32(math.MaxUint32)
		if r.uid != nil {
			uid = *r.uid
		}
		if acc, err = findAccount(f, r.name, uid); err != nil {
			return nil, err
		}
	}
	if acc == nil && r.uid == nil {
		return nil, errs.New(errs.FailedPrecondition, "user %q is not in /etc/passwd of the image", r.name)
	}
	return acc, nil
}

func groups(root Root, name, member string) (gid *uint32, of []uint32, err error) {
	f, err := openAccounts(root, "/etc/group")
	if err != nil {
		return nil, nil, err
	}
	if f != nil {
		defer f.Close()
		if gid, of, err = findGroups(f, name, member); err != nil {
			return nil, nil, err
		}
	}
	if name != "" && gid == nil {
		return nil, nil, errs.New(errs.FailedPrecondition, "group %q is not in /etc/group of the image", name)
	}
	return gid, of, nil
}

// groupSet is the exact set for setgroups(2): the primary group always (else a
// file that the group may not read becomes readable, CVE-2023-25173), then the
// others in order.
func groupSet(gid uint32, of []uint32, asked []int64) ([]uint32, error) {
	if len(asked) > maxGroups {
		return nil, errs.New(errs.InvalidArgument, "supplemental_groups: more than %d", maxGroups)
	}
	rest := slices.Clone(of)
	for _, g := range asked {
		n, err := id("supplemental_groups", g)
		if err != nil {
			return nil, err
		}
		rest = append(rest, *n)
	}
	slices.Sort(rest)
	rest = slices.DeleteFunc(slices.Compact(rest), func(g uint32) bool { return g == gid })
	if len(rest) >= maxGroups {
		return nil, errs.New(errs.InvalidArgument, "supplemental_groups: with those of the image more than %d", maxGroups)
	}
	return append([]uint32{gid}, rest...), nil
}

// mapped checks that a user namespace knows every id, before setresuid and
// setgroups answer EINVAL.
func (b *builder) mapped() error {
	if len(b.in.UIDMap) == 0 {
		return nil
	}
	if !covers(b.in.UIDMap, b.who.UID) {
		return errs.New(errs.InvalidArgument, "uid %d is outside the pod's user namespace", b.who.UID)
	}
	for _, g := range b.who.Groups {
		if !covers(b.in.GIDMap, g) {
			return errs.New(errs.InvalidArgument, "gid %d is outside the pod's user namespace", g)
		}
	}
	return nil
}

func covers(maps []runtime.IDMap, id uint32) bool {
	return slices.ContainsFunc(maps, func(m runtime.IDMap) bool { return id >= m.ContainerID && id-m.ContainerID < m.Size })
}

// ValidateIDMaps checks the mappings of a user namespace (user_namespaces(7)):
// both kinds or none, no empty, overflowing or overlapping ranges, and never
// the host's root. The kernel takes up to 340 lines.
func ValidateIDMaps(uid, gid []runtime.IDMap) error {
	if (len(uid) == 0) != (len(gid) == 0) {
		return errs.New(errs.InvalidArgument, "a user namespace needs uid and gid mappings")
	}
	for _, k := range []struct {
		kind string
		maps []runtime.IDMap
	}{{"uid", uid}, {"gid", gid}} {
		if len(k.maps) > 340 {
			return errs.New(errs.InvalidArgument, "%s mappings: more than 340", k.kind)
		}
		for i, m := range k.maps {
			const end = 1<<32 - 1 // (uid_t)-1 cannot be mapped
			if m.Size == 0 || uint64(m.HostID)+uint64(m.Size) > end || uint64(m.ContainerID)+uint64(m.Size) > end {
				return errs.New(errs.InvalidArgument, "%s mapping %d:%d:%d: empty or past the last id", k.kind, m.ContainerID, m.HostID, m.Size)
			}
			if m.HostID == 0 {
				return errs.New(errs.InvalidArgument, "%s mapping %d:%d:%d: would give away the host's root", k.kind, m.ContainerID, m.HostID, m.Size)
			}
			for _, o := range k.maps[:i] {
				if overlap(m.ContainerID, m.Size, o.ContainerID, o.Size) || overlap(m.HostID, m.Size, o.HostID, o.Size) {
					return errs.New(errs.InvalidArgument, "%s mapping %d:%d:%d: overlaps another", k.kind, m.ContainerID, m.HostID, m.Size)
				}
			}
		}
	}
	return nil
}

func overlap(a, n, b, m uint32) bool {
	return uint64(a) < uint64(b)+uint64(m) && uint64(b) < uint64(a)+uint64(n)
}
