package ipam

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"github.com/naru-project/naru/internal/errs"
)

func set(t *testing.T, cidrs ...string) *Allocator {
	t.Helper()
	p, err := ParsePrefixes(cidrs...)
	if err != nil {
		t.Fatal(err)
	}
	a := New()
	if err := a.SetCIDRs(p); err != nil {
		t.Fatal(err)
	}
	return a
}

func TestUsableAddresses(t *testing.T) {
	for cidr, want := range map[string]struct {
		n           int
		first, last string
	}{
		"10.0.0.0/28":      {13, "10.0.0.2", "10.0.0.14"},
		"10.0.0.0/29":      {5, "10.0.0.2", "10.0.0.6"},
		"10.0.0.8/30":      {2, "10.0.0.9", "10.0.0.10"},
		"10.0.0.8/31":      {2, "10.0.0.8", "10.0.0.9"},
		"10.0.0.8/32":      {1, "10.0.0.8", "10.0.0.8"},
		"10.0.0.5/24":      {253, "10.0.0.2", "10.0.0.254"},
		"fd00::/125":       {6, "fd00::2", "fd00::7"},
		"fd00::/126":       {4, "fd00::", "fd00::3"},
		"fd00::1/128":      {1, "fd00::1", "fd00::1"},
		"255.255.255.0/24": {253, "255.255.255.2", "255.255.255.254"},
	} {
		a := set(t, cidr)
		var got []netip.Addr
		for i := 0; ; i++ {
			ips, err := a.Lease(fmt.Sprint(i))
			if err != nil {
				if !errs.Is(err, errs.ResourceExhausted) {
					t.Fatalf("%s: %v", cidr, err)
				}
				break
			}
			got = append(got, ips...)
		}
		if len(got) != want.n || got[0].String() != want.first || got[len(got)-1].String() != want.last {
			t.Errorf("%s: %d addresses, %v to %v", cidr, len(got), got[0], got[len(got)-1])
		}
	}
}

func TestRoundRobinNotReusedAtOnce(t *testing.T) {
	a := set(t, "10.0.0.0/28")
	seen := map[netip.Addr]int{}
	for i := range 13 * 4 {
		id := fmt.Sprint(i)
		ips, err := a.Lease(id)
		if err != nil {
			t.Fatal(err)
		}
		seen[ips[0]]++
		a.Release(id)
		a.Release(id)
	}
	for ip, n := range seen {
		if n != 4 {
			t.Errorf("%s given %d times of 4", ip, n)
		}
	}
	if len(seen) != 13 {
		t.Errorf("%d addresses", len(seen))
	}
}

func TestDualStackAllOrNone(t *testing.T) {
	a := set(t, "fd00::/64,10.0.0.0/31")
	for i := range 2 {
		ips, err := a.Lease(fmt.Sprint(i))
		if err != nil || len(ips) != 2 || !ips[0].Is6() || !ips[1].Is4() {
			t.Fatalf("%v, %v", ips, err)
		}
	}
	if _, err := a.Lease("x"); !errs.Is(err, errs.ResourceExhausted) {
		t.Fatal(err)
	}
	if n := len(a.byIP); n != 4 {
		t.Fatalf("%d leases after a refusal", n)
	}
	a.Release("0")
	again, err := a.Lease("1")
	if err != nil || len(again) != 2 || len(a.byIP) != 2 {
		t.Fatalf("lease repeated: %v %v", again, err)
	}
}

func TestChangedRangeAndAdopt(t *testing.T) {
	a := New()
	if _, err := a.Lease("a"); !errs.Is(err, errs.Unavailable) {
		t.Fatal(err)
	}
	if err := a.SetCIDRs([]netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}); err != nil {
		t.Fatal(err)
	}
	old := netip.MustParseAddr("10.0.0.7")
	if err := a.Adopt("old", []netip.Addr{old}); err != nil {
		t.Fatal(err)
	}
	if err := a.Adopt("old", []netip.Addr{old}); err != nil {
		t.Fatal(err)
	}
	if err := a.Adopt("thief", []netip.Addr{old}); !errs.Is(err, errs.FailedPrecondition) {
		t.Fatal(err)
	}
	if s := a.Outside(a.CIDRs()); len(s) != 1 || s[0] != old {
		t.Fatalf("strays %v", s)
	}
	if err := a.Adopt("b", []netip.Addr{netip.MustParseAddr("10.1.0.9")}); err != nil {
		t.Fatal(err)
	}
	if ips, _ := a.Lease("c"); ips[0].String() != "10.1.0.10" {
		t.Fatalf("after adopting .9: %v", ips)
	}
	a.Release("old")
	if s := a.Outside(a.CIDRs()); len(s) != 0 {
		t.Fatalf("strays %v", s)
	}
}

func TestConcurrentNoDuplicate(t *testing.T) {
	a := set(t, "10.0.0.0/28")
	var wg sync.WaitGroup
	var mu sync.Mutex
	held := map[netip.Addr]string{}
	for i := range 300 {
		wg.Go(func() {
			id := fmt.Sprint(i)
			ips, err := a.Lease(id)
			if err != nil {
				if !errs.Is(err, errs.ResourceExhausted) {
					t.Error(err)
				}
				return
			}
			mu.Lock()
			if o, dup := held[ips[0]]; dup {
				t.Errorf("%s given to %s and %s", ips[0], o, id)
			}
			held[ips[0]] = id
			mu.Unlock()
			mu.Lock()
			delete(held, ips[0])
			mu.Unlock()
			a.Release(id)
		})
	}
	wg.Wait()
	if len(a.byIP)+len(a.byID) != 0 {
		t.Fatalf("left %v", a.byIP)
	}
}

func TestBadRanges(t *testing.T) {
	for _, s := range []string{"127.0.0.0/8", "0.0.0.0/0", "224.0.0.0/8", "fe80::/64", "::ffff:10.0.0.0/104", "::/0", "10.0.0.0/24,10.0.0.0/25", "169.254.0.0/16"} {
		p, err := ParsePrefixes(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := New().SetCIDRs(p); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range []string{"10.0.0.0", "10.0.0.0/33", "a/8", "10.0.0.0/24;10.1.0.0/24", "fe80::%eth0/64"} {
		if p, err := ParsePrefixes(s); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %v %v", s, p, err)
		}
	}
}

func FuzzParsePrefixes(f *testing.F) {
	f.Add("10.0.0.0/24, fd00::/64")
	f.Add("::ffff:1.2.3.4/120")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePrefixes(s)
		if err != nil {
			return
		}
		a := New()
		if a.SetCIDRs(p) != nil || len(p) == 0 {
			return
		}
		ips, err := a.Lease("x")
		if err != nil {
			t.Fatal(err)
		}
		for _, ip := range ips {
			ok := false
			for _, q := range p {
				ok = ok || q.Contains(ip)
			}
			if !ok {
				t.Fatalf("%s not in %v", ip, p)
			}
		}
	})
}

func TestUsage(t *testing.T) {
	a := New()
	if u := a.Usage(); len(u) != 0 {
		t.Errorf("without ranges: %v", u)
	}
	set := func(list ...string) {
		t.Helper()
		p, err := ParsePrefixes(list...)
		if err == nil {
			err = a.SetCIDRs(p)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	set("10.9.0.0/28", "fd00:9::/64")
	free := a.Usage()[0].Free
	n := 0
	for ; ; n++ { // what it says is free is what it gives
		if _, err := a.Lease(fmt.Sprint(n)); err != nil {
			break
		}
	}
	u := a.Usage()
	if float64(n) != free || u[0] != (Usage{IPv4: true, Used: free}) || u[1].Used != free || u[1].Free < 1<<60 {
		t.Errorf("%d leases; before %v free, now %v", n, free, u)
	}
	set("10.8.0.0/28") // all leases are strays now
	if u = a.Usage(); len(u) != 2 || u[0] != (Usage{IPv4: true, Used: free, Free: free}) || u[1] != (Usage{Used: free}) {
		t.Errorf("with strays: %v", u)
	}
}
