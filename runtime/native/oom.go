package native

import (
	"fmt"

	"github.com/naru-project/naru/internal/errs"
)

// explain names the OOM killer where it is why a creation failed: all that the
// daemon sees of it by itself is that the child is gone, as an end of file, a
// broken pipe or a missing process, wherever it happened to be. The caller can
// help it, so it is errs.FailedPrecondition.
func (k *creation) explain(err error) error {
	if k.group == nil || err == nil {
		return err
	}
	if n, oerr := k.group.OOMKills(); oerr != nil || n == 0 {
		return err
	}
	limit := "it has no memory limit of its own: that of the pod or the node's memory was reached"
	if m := k.c.Resources.Memory; m > 0 {
		limit = fmt.Sprintf("its memory limit of %s (or the pod's) is too low", byteSize(m))
	}
	return errs.New(errs.FailedPrecondition, "the kernel's OOM killer ended the container's process before it could start; %s (%w)", limit, err)
}

// byteSize writes a size as Kubernetes does, exactly.
func byteSize(n int64) string {
	for _, u := range []struct {
		shift int
		name  string
	}{{30, "Gi"}, {20, "Mi"}, {10, "Ki"}} {
		if n>>u.shift<<u.shift == n {
			return fmt.Sprintf("%d%s", n>>u.shift, u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}
