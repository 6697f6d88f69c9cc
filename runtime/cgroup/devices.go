package cgroup

import (
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
)

// Access bits, with the values of BPF_DEVCG_ACC_* (linux/bpf.h).
const (
	accMknod = 1 << iota
	accRead
	accWrite
	accAll = accMknod | accRead | accWrite
)

// anyNumber stands for every major or minor.
const anyNumber = -1

// maxDeviceNumber is the highest minor that the kernel can hold (20 bits).
const maxDeviceNumber = 1<<20 - 1

// deviceRule is one exception from a policy's default.
type deviceRule struct {
	kind         byte // 'c', 'b', or 'a' for both
	major, minor int64
	access       int
}

// devicePolicy is an ordered rule list boiled down to a default and its
// exceptions, all of the opposite sign. A request is decided as in version 1's
// device controller: with default deny it needs one exception that covers all
// of its access; with default allow any overlap with an exception refuses it.
type devicePolicy struct {
	allow bool
	rules []deviceRule
}

// newDevicePolicy applies the OCI rules in order. Without rules everything is
// denied. An empty type means all, as nil numbers and an empty access do.
func newDevicePolicy(list []specs.LinuxDeviceCgroup) (*devicePolicy, error) {
	p := &devicePolicy{}
	for i := range list {
		r, err := parseDevice(&list[i])
		if err != nil {
			return nil, err
		}
		if err := p.add(r, list[i].Allow); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// unrestricted reports that nothing needs to be done.
func (p *devicePolicy) unrestricted() bool { return p.allow && len(p.rules) == 0 }

func (p *devicePolicy) add(r deviceRule, allow bool) error {
	if r.kind == 'a' {
		if r.access != accAll || r.major != anyNumber || r.minor != anyNumber {
			return errs.New(errs.InvalidArgument, "device rule of type a: it is for all devices and accesses, or for none")
		}
		p.allow, p.rules = allow, nil
		return nil
	}
	at := p.find(r)
	if allow != p.allow {
		if at >= 0 {
			p.rules[at].access |= r.access
		} else {
			p.rules = append(p.rules, r)
		}
		return nil
	}
	if at >= 0 {
		p.rules[at].access &^= r.access
		if p.rules[at].access == 0 {
			p.rules = append(p.rules[:at], p.rules[at+1:]...)
		}
	}
	// What repeats the default changes nothing more, unless a wider exception
	// says otherwise: neither version of cgroups can express that.
	for _, o := range p.rules {
		if o.overlaps(r) {
			return errs.New(errs.InvalidArgument,
				"device rule %s: an earlier rule for a wider set of devices says the opposite, and the kernel cannot except from it", r)
		}
	}
	return nil
}

func (p *devicePolicy) find(r deviceRule) int {
	for i, o := range p.rules {
		if o.kind == r.kind && o.major == r.major && o.minor == r.minor {
			return i
		}
	}
	return -1
}

func (r deviceRule) overlaps(o deviceRule) bool {
	return r.kind == o.kind && r.access&o.access != 0 &&
		(r.major == anyNumber || o.major == anyNumber || r.major == o.major) &&
		(r.minor == anyNumber || o.minor == anyNumber || r.minor == o.minor)
}

// String is the rule as the files of version 1 want it: "c 1:3 rwm".
func (r deviceRule) String() string {
	access := ""
	for _, a := range []struct {
		bit int
		c   string
	}{{accRead, "r"}, {accWrite, "w"}, {accMknod, "m"}} {
		if r.access&a.bit != 0 {
			access += a.c
		}
	}
	return string(r.kind) + " " + number(r.major) + ":" + number(r.minor) + " " + access
}

func number(n int64) string {
	if n == anyNumber {
		return "*"
	}
	return strconv.FormatInt(n, 10)
}

func parseDevice(d *specs.LinuxDeviceCgroup) (deviceRule, error) {
	r := deviceRule{kind: 'a', major: anyNumber, minor: anyNumber}
	switch d.Type {
	case "", "a":
	case "b", "c":
		r.kind = d.Type[0]
	default:
		return r, errs.New(errs.InvalidArgument, "device type %q: want a, b or c", clip(d.Type))
	}
	for _, n := range []struct {
		from *int64
		to   *int64
	}{{d.Major, &r.major}, {d.Minor, &r.minor}} {
		if n.from == nil || *n.from == anyNumber {
			continue
		}
		if *n.from < 0 || *n.from > maxDeviceNumber {
			return r, errs.New(errs.InvalidArgument, "device number %d: want 0 to %d", *n.from, maxDeviceNumber)
		}
		*n.to = *n.from
	}
	for i := 0; i < len(d.Access); i++ {
		switch d.Access[i] {
		case 'r':
			r.access |= accRead
		case 'w':
			r.access |= accWrite
		case 'm':
			r.access |= accMknod
		default:
			return r, errs.New(errs.InvalidArgument, "device access %q: want some of rwm", clip(d.Access))
		}
	}
	if r.access == 0 {
		r.access = accAll
	}
	return r, nil
}

// applyDevicesV1 writes the policy to devices.allow and devices.deny of a new
// group, which starts with what its parent may do.
func applyDevicesV1(dir int, rel string, p *devicePolicy) error {
	if p.unrestricted() {
		return nil
	}
	file := rel + "/devices.deny"
	if !p.allow {
		if err := writeAt(dir, file, "a"); err != nil {
			return classify(err, "deny all devices")
		}
		file = rel + "/devices.allow"
	}
	for _, r := range p.rules {
		if err := writeAt(dir, file, r.String()); err != nil {
			return classify(err, "set device rule %s", r)
		}
	}
	return nil
}
