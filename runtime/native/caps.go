package native

import (
	"strings"

	"github.com/moby/sys/capability"
)

var capNumbers = func() map[string]uint64 {
	m := map[string]uint64{}
	for _, c := range capability.ListKnown() {
		m["CAP_"+strings.ToUpper(c.String())] = 1 << uint(c)
	}
	return m
}()

// capMask turns names ("CAP_CHOWN") into a mask. The spec builder has checked
// the names.
func capMask(names []string) uint64 {
	var m uint64
	for _, n := range names {
		m |= capNumbers[n]
	}
	return m
}
