package native

import (
	"testing"

	"github.com/naru-project/naru/runtime"
)

// BenchmarkExec measures one ExecSync of a program that ends at once.
func BenchmarkExec(b *testing.B) {
	r := newRing(b)
	c := r.container("sleep", "1000")
	r.run(c)
	for b.Loop() {
		if _, err := r.ExecSync(b.Context(), c, runtime.ExecSpec{Args: []string{"/bin/true"}}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkContainer measures create, start and delete of a container.
func BenchmarkContainer(b *testing.B) {
	r := newRing(b)
	for b.Loop() {
		c := r.container("/bin/true")
		root := r.rootfs(c)
		if _, err := r.Create(b.Context(), c, root); err != nil {
			b.Fatal(err)
		}
		if err := r.Start(b.Context(), c); err != nil {
			b.Fatal(err)
		}
		if err := r.Delete(b.Context(), c); err != nil {
			b.Fatal(err)
		}
	}
}
