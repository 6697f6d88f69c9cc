// Package failpoint names the moments at which a test may break a process: each
// named step of an operation, of a sandbox, of the executor, of the worker, and
// each write of a record. In a build with the tag failpoint a test chooses one
// and what happens there (an error, a panic, a delay, or to be held until the
// test has killed whom it wants); in all other builds Hit is an empty function
// that the compiler leaves out.
package failpoint
