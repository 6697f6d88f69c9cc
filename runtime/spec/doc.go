// Package spec builds the OCI runtime specification of one container from what
// CRI, the image and the host say.
//
// Build is a pure function of its Input: it changes nothing on the host. It
// reads a file only through what Input brings: the root file system's passwd
// and group (Root), device nodes of the host (Devices) and a Localhost seccomp
// profile by its path. Every rule about what a container may be stands here,
// once: who it runs as, what it may do, what it sees. The executor carries out
// and need not judge.
//
// Input from the image is hostile, input from kubelet is policy: trusted, yet
// validated. Errors name the field and are errs.InvalidArgument where the
// request can never work, errs.FailedPrecondition where this image or host
// lacks something.
//
// It must not know about pods, CRI messages, layers or processes.
//
// Concurrency: no state; everything may be called concurrently.
package spec
