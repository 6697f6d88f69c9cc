package hostport

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/naru-project/naru/internal/errs"
)

func key(proto string, port uint16, ip string) Key {
	k := Key{Proto: proto, Port: port}
	if ip != "" {
		k.IP = netip.MustParseAddr(ip)
	}
	return k
}

func TestConflicts(t *testing.T) {
	for _, c := range []struct {
		a, b  Key
		clash bool
	}{
		{key("tcp", 80, ""), key("tcp", 80, ""), true},
		{key("tcp", 80, ""), key("tcp", 80, "10.0.0.1"), true},
		{key("tcp", 80, "10.0.0.1"), key("tcp", 80, ""), true},
		{key("tcp", 80, "10.0.0.1"), key("tcp", 80, "10.0.0.1"), true},
		{key("tcp", 80, "10.0.0.1"), key("tcp", 80, "10.0.0.2"), false},
		{key("tcp", 80, "10.0.0.1"), key("tcp", 80, "fd00::1"), false},
		{key("tcp", 80, ""), key("udp", 80, ""), false},
		{key("tcp", 80, ""), key("tcp", 81, ""), false},
	} {
		r := New()
		if err := r.Claim("aaaaaaaaaaaaaaaaaaaa", "ns/one", []Key{c.a}); err != nil {
			t.Fatal(err)
		}
		free := key("sctp", 9, "")
		err := r.Claim("b", "ns/two", []Key{free, c.b})
		if (err != nil) != c.clash {
			t.Errorf("%v then %v: %v", c.a, c.b, err)
		}
		if err == nil {
			continue
		}
		if !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "held by pod ns/one (aaaaaaaaaaaaa)") {
			t.Errorf("error %v", err)
		}
		if _, taken := r.Owner(free); taken {
			t.Error("a refused claim left a port taken")
		}
		r.Release("aaaaaaaaaaaaaaaaaaaa")
		r.Release("aaaaaaaaaaaaaaaaaaaa")
		if err := r.Claim("b", "ns/two", []Key{free, c.b}); err != nil {
			t.Errorf("after release: %v", err)
		}
	}
}

func TestClaimAgainReplaces(t *testing.T) {
	r := New()
	if err := r.Claim("a", "x", []Key{key("tcp", 1, ""), key("tcp", 2, "")}); err != nil {
		t.Fatal(err)
	}
	if err := r.Claim("a", "x", []Key{key("tcp", 2, "")}); err != nil {
		t.Fatal(err)
	}
	if err := r.Claim("b", "y", []Key{key("tcp", 1, "10.0.0.1")}); err != nil {
		t.Fatal(err)
	}
	r.Release("a")
	r.Release("b")
	if len(r.used)+len(r.byID) != 0 {
		t.Fatalf("left %v %v", r.used, r.byID)
	}
}
