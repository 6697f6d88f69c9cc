#!/bin/bash
# Builds the test machine's image (Debian under QEMU, see mkvm.sh), once; it is
# kept in the cache.
#   hack/vm/image.sh [bookworm|backports]
# bookworm: Debian 12 with its own kernel (6.1), the oldest that is promised.
# backports: the same userland with a kernel from trixie-backports.
. "$(dirname "$0")/../lib.sh"
need_root
need qemu-system-x86_64 debootstrap mke2fs cpio zstd xz bc
name=${1:-bookworm}
case $name in
bookworm) export SUITE=bookworm ;;
backports) export SUITE=bookworm KSUITE=trixie-backports ;;
*) die "no image is called $name" ;;
esac
export NAME=$name VM_CACHE=$cache/vm EXTRA="apparmor curl criu"
mkdir -p "$VM_CACHE"
# Images that no name leads to any more are old ones.
for dir in "$VM_CACHE"/*/; do
	if [ ! -L "${dir%/}" ] && [ -e "$dir/ok" ] && ! find "$VM_CACHE" -maxdepth 1 -type l -lname "$(basename "$dir")" | grep -q .; then rm -rf "$dir"; fi
done
say "the test machine $name is in $("$top/hack/vm/mkvm.sh")"
