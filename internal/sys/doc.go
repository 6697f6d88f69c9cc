// Package sys holds thin helpers over Linux system calls: threads that change
// their namespaces, paths inside a hostile tree, detached mounts, a procfs of
// our own. It decides nothing.
package sys
