// Package seccomp turns seccomp profiles into the filter bytes that the kernel
// loads: it resolves the built-in default profile and Localhost profiles for
// the capabilities of a container, and compiles an OCI profile to classic BPF
// without libseccomp.
//
// It must not know about containers, files other than the profile it is asked
// to load, or how a filter gets installed.
//
// # What a profile means
//
// The meaning is that of the OCI runtime specification, with libseccomp's
// reading where the specification is silent, and these decisions where the two
// leave room:
//
//   - The conditions of one rule are ANDed, also those on the same argument;
//     a rule whose conditions can never hold together is refused, because
//     somebody wrote it expecting something else. Rules of one system call are
//     ORed.
//   - When several rules match, the strictest action wins, in the order in
//     which the kernel itself ranks the answers of stacked filters
//     (seccomp(2)); between equals the first in the profile. libseccomp lets
//     an unconditional rule hide the others, so this is never weaker.
//   - A rule without conditions that says what the default says is no rule
//     (libseccomp refuses it, other runtimes skip it).
//   - Where the ABI has 32-bit registers (i386, arm, and x32 as in libseccomp)
//     only the low words of the arguments are compared: a 64-bit program that
//     enters by int 0x80 can leave anything in the upper halves.
//   - A number above every one that the profile names for an ABI answers
//     ENOSYS instead of a restrictive default, so that a libc that probes for
//     a newer system call takes its fallback. Numbers at or below are known to
//     the author and get the default.
//   - A foreign architecture kills the process. x32 numbers on amd64 answer
//     ENOSYS unless the profile lists SCMP_ARCH_X32, as a kernel without x32
//     does.
//   - i386 multiplexers: socketcall(2) and ipc(2) hide their arguments behind a
//     pointer. A rule without conditions for, say, bind applies to
//     socketcall(SYS_BIND) too. A rule with conditions applies there only when
//     it is stricter than the default, and then to the whole call.
//   - Names that an ABI lacks are skipped, as in every other runtime.
//
// # Concurrency
//
// All functions are pure but for Load (one file) and the kernel release, read
// once; they may be called concurrently. Compile costs well below a
// millisecond; callers cache its result by profile.
package seccomp
