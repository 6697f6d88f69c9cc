// Package cgroup makes, limits, watches, kills and removes control groups.
//
// A Driver knows once, from start-up, how the host mounts its hierarchies:
// version 2 alone, version 1 alone, or the hybrid of version 1 controllers with
// an empty version 2 tree beside them. It hands out Groups: a container's
// cgroup in every hierarchy at once. A Group holds nothing but a path and, until
// Close, the few file descriptors that a child needs to enter it; whatever is
// asked of it later is asked of the kernel.
//
// How a child enters, without a single slow write:
//   - CloneFD is the folder of the version 2 tree, for CLONE_INTO_CGROUP;
//   - TaskFDs are the "tasks" files of the version 1 trees. The child writes "0"
//     into each. A write to version 1's cgroup.procs would wait for an RCU grace
//     period instead (some 10 ms).
//   - With the systemd driver the scope cannot exist before it has a process:
//     Create only checks and remembers, both descriptors are absent, and
//     Group.AddPID makes the scope around the waiting child.
//
// A cgroup that was once told cgroup.kill is of no more use: kernels from 6.14
// (seen on 6.18) kill whatever CLONE_INTO_CGROUP puts there later, because they
// compare the count of its kills with that of the cgroup of the cloning
// process. Kill is therefore the end of a Group, and the process that clones
// must itself live in a cgroup that was never killed that way.
//
// The package must not know pods as records, CRI or images.
//
// Concurrency: all methods of Driver may be called at the same time. Calls on
// one Group are serialised by the caller, except Kill, Procs, OOMKills and
// NewExec, which may run beside any other.
//
// The rules that values follow are those of cgroups(7) and of the kernel's
// Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/.
package cgroup
