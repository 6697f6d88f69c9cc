//go:build !failpoint

package failpoint

// Hit passes the point "area of: step". The error is the test's.
func Hit(_, _, _ string) error { return nil }

// Environ is what a child needs to be under the same test.
func Environ() []string { return nil }
