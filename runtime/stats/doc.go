// Package stats reads what cgroups have used: one reader for every API, so that
// lists, single statistics and metrics show the same numbers and cost one read.
//
// A Sampler keeps the last sample of each cgroup. Get answers from it while it
// is at most MaxAge old (a second); an older one is read anew, once, however many
// ask. Nothing runs while nobody asks: an idle node costs nothing. The rate
// UsageNanoCores is that between the last two samples, however far apart.
//
// Detailed adds to the sample what only metrics tell and what costs a look at
// every process of the container; it is not read for anybody else.
//
// A sample costs a fixed number of small files. What the container does below
// its own cgroup (10,000 nested ones) does not show: every figure is the
// kernel's hierarchical one.
//
// Concurrency: all methods may be called at the same time. The samples handed
// out are shared and must not be written to. No lock is held over a read but
// that of the one cgroup, and a fresh sample is returned without any.
package stats
