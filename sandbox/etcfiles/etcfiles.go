// Package etcfiles makes the content of a pod's /etc/hostname, /etc/hosts and
// /etc/resolv.conf. Pure functions over strings and bytes; the caller reads
// and writes files.
package etcfiles

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"

	"github.com/naru-project/naru/internal/errs"
)

// Limits of what a request may put into the files. HOST_NAME_MAX is the
// kernel's (sethostname(2)).
const (
	maxHostname = 64
	maxEntries  = 256
	maxEntry    = 1024
)

// CheckHostname accepts what can be a host name: letters, digits, dot, dash
// and underscore.
func CheckHostname(h string) error {
	if len(h) > maxHostname {
		return errs.New(errs.InvalidArgument, "hostname %.80q is longer than %d bytes, the kernel's limit", h, maxHostname)
	}
	for i := range len(h) {
		c := h[i]
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_'
		if !ok || i == 0 && (c == '-' || c == '.') {
			return errs.New(errs.InvalidArgument, "hostname %q has a character that cannot stand there", h)
		}
	}
	return nil
}

// Hosts is /etc/hosts of a pod with a network of its own.
func Hosts(hostname string, ips []netip.Addr) []byte {
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n" +
		"::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"fe00::\tip6-localnet\n" +
		"fe00::\tip6-mcastprefix\n" +
		"fe00::1\tip6-allnodes\n" +
		"fe00::2\tip6-allrouters\n")
	if hostname != "" {
		for _, ip := range ips {
			fmt.Fprintf(&b, "%s\t%s\n", ip, hostname)
		}
	}
	return b.Bytes()
}

// CheckDNS refuses values that would become more than one word of one line.
func CheckDNS(servers, searches, options []string) error {
	for _, list := range []struct {
		what   string
		values []string
	}{{"DNS server", servers}, {"DNS search domain", searches}, {"DNS option", options}} {
		if len(list.values) > maxEntries {
			return errs.New(errs.InvalidArgument, "%d entries as %s, at most %d can be", len(list.values), list.what, maxEntries)
		}
		for _, v := range list.values {
			if v == "" || len(v) > maxEntry || strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '\ufffd' }) {
				return errs.New(errs.InvalidArgument, "%s %.100q must be one printable word", list.what, v)
			}
		}
	}
	return nil
}

// Resolv is resolv.conf(5) with exactly these values.
func Resolv(servers, searches, options []string) []byte {
	var b bytes.Buffer
	if len(searches) > 0 {
		b.WriteString("search " + strings.Join(searches, " ") + "\n")
	}
	for _, s := range servers {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(options) > 0 {
		b.WriteString("options " + strings.Join(options, " ") + "\n")
	}
	return b.Bytes()
}

// WithoutLoopback copies a resolv.conf of the host for a pod with its own
// network, where a name server on the host's loopback cannot be reached (and
// the same address could be something else). servers tells how many are left.
func WithoutLoopback(conf []byte) (out []byte, servers int) {
	var b bytes.Buffer
	for line := range bytes.Lines(conf) {
		f := strings.Fields(string(line))
		if len(f) >= 2 && f[0] == "nameserver" {
			if loopback(f[1]) {
				continue
			}
			servers++
		}
		b.Write(bytes.TrimRight(line, "\r\n"))
		b.WriteByte('\n')
	}
	return b.Bytes(), servers
}

func loopback(s string) bool {
	a, err := netip.ParseAddr(s)
	if err != nil {
		// glibc also reads the old short forms: 127.1
		return strings.HasPrefix(s, "127.") || s == "127"
	}
	a = a.Unmap()
	return a.IsLoopback() || a.IsUnspecified()
}
