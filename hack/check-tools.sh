#!/bin/bash
# Says in one sentence which programs a target needs and does not find.
#   hack/check-tools.sh demo|test
. "$(dirname "$0")/lib.sh"
case ${1:-} in
demo) need ip nsenter unshare nft awk find curl apt-get dpkg-deb ;;
test) need busybox ip nsenter unshare nft awk find curl apt-get dpkg-deb dpkg-source gcc make iptables /usr/lib/cni/bridge ;;
*) die "usage: $0 demo|test" ;;
esac
