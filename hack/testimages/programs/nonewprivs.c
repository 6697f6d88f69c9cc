/* Installed setuid root: prints the effective user, so that a test can see
 * whether no_new_privs was in force. */
#include <stdio.h>
#include <unistd.h>

int main(void) {
	printf("Effective uid: %d\n", (int)geteuid());
	return 0;
}
