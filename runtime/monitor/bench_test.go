package monitor_test

import "testing"

// BenchmarkExec is an exec of /bin/true, from the request to the reaped end.
func BenchmarkExec(b *testing.B) {
	n := newNode(b)
	for b.Loop() {
		p, err := n.exec(n.c, spec{args: []string{"/bin/true", "x"}}, false, nil, nil)
		if err != nil {
			b.Fatal(err)
		}
		if x, err := p.Wait(n.ctx); err != nil || x.Status != 0 {
			b.Fatal(x, err)
		}
		p.Close()
	}
}

// BenchmarkContainer is create, start, exit and delete of /bin/true.
func BenchmarkContainer(b *testing.B) {
	n := newNode(b)
	for b.Loop() {
		c := n.run(spec{args: []string{"/bin/true", "x"}})
		n.wait(c.id)
		if err := n.c.Delete(n.ctx, c.id); err != nil {
			b.Fatal(err)
		}
		_, _ = c.pidfd.Close(), c.stdin.Close()
	}
}
