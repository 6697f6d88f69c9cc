/*
 * Reads a resolved profile in the words of profile_test.go on stdin and writes
 * the filter that libseccomp makes of it on stdout; names that this libseccomp
 * does not know go to stderr, one per line. See README.md.
 */
#include <errno.h>
#include <seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint32_t arch_of(const char *name)
{
	if (!strcmp(name, "SCMP_ARCH_X86_64")) return SCMP_ARCH_X86_64;
	if (!strcmp(name, "SCMP_ARCH_X86")) return SCMP_ARCH_X86;
	if (!strcmp(name, "SCMP_ARCH_X32")) return SCMP_ARCH_X32;
	if (!strcmp(name, "SCMP_ARCH_AARCH64")) return SCMP_ARCH_AARCH64;
	if (!strcmp(name, "SCMP_ARCH_ARM")) return SCMP_ARCH_ARM;
	fprintf(stderr, "unknown architecture %s\n", name);
	exit(2);
}

static void must(int rc, const char *what)
{
	if (rc < 0 && rc != -EEXIST) {
		fprintf(stderr, "%s: %s\n", what, strerror(-rc));
		exit(2);
	}
}

int main(void)
{
	scmp_filter_ctx ctx = NULL;
	char word[64], name[128];
	unsigned int ret, n;

	while (scanf("%63s", word) == 1) {
		if (!strcmp(word, "default")) {
			if (scanf("%x", &ret) != 1 || !(ctx = seccomp_init(ret)))
				exit(2);
			must(seccomp_attr_set(ctx, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS), "badarch");
			must(seccomp_arch_remove(ctx, SCMP_ARCH_NATIVE), "remove native");
		} else if (!strcmp(word, "arch")) {
			if (scanf("%127s", name) != 1)
				exit(2);
			must(seccomp_arch_add(ctx, arch_of(name)), name);
		} else { /* rule */
			struct scmp_arg_cmp args[6];
			int nr;

			if (scanf("%x %127s %u", &ret, name, &n) != 3 || n > 6)
				exit(2);
			for (unsigned int i = 0; i < n; i++) {
				unsigned int arg, op;
				unsigned long long a, b;
				if (scanf("%u %u %llx %llx", &arg, &op, &a, &b) != 4)
					exit(2);
				args[i] = (struct scmp_arg_cmp){ arg, (enum scmp_compare)op, a, b };
			}
			nr = seccomp_syscall_resolve_name(name);
			if (nr == __NR_SCMP_ERROR) {
				fprintf(stderr, "%s\n", name);
				continue;
			}
			must(seccomp_rule_add_array(ctx, ret, nr, n, args), name);
		}
	}
	must(seccomp_export_bpf(ctx, STDOUT_FILENO), "export");
	return 0;
}
