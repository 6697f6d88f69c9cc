#!/bin/bash
# Runs inside the test machine; see test.sh. The tree is at /vm/naru, read-only.
#   guest.sh PART...
set -uo pipefail
tree=/vm/naru
export NARU_IMAGES=$tree/images NARU_CACHE=/var/tmp/cache TMPDIR=/var/tmp NARU_SLOW=10 NO_COLOR=1
export LC_ALL=C
modprobe -aq overlay dummy veth nf_tables nft_masq nft_nat nft_fib_inet br_netfilter unix_diag tcp_diag udp_diag inet_diag packet_diag netlink_diag 2>/dev/null # the last ones for criu
driver=${NARU_CGROUP_DRIVER:-cgroupfs}
export NARU_CGROUP_DRIVER=$driver CRITEST_TIMEOUT=40m
failed=()

uptime_s() { cut -d' ' -f1 /proc/uptime; }
since() { awk -v a="$1" -v b="$(uptime_s)" 'BEGIN {printf "%.0f", b - a}'; }

part_demo() { "$tree/hack/demo.sh"; }

part_service() { bash "$tree/hack/vm/service.sh"; }

part_apparmor() {
	# critest calls apparmor_parser through sudo.
	FOCUS=AppArmor LEAST=9 PARALLEL=1 REPORT=/vm/out/apparmor.xml "$tree/hack/critest.sh"
}

# All specs but the five benchmarks: nothing is missing here.
part_critest() { PARALLEL=2 LEAST=117 REPORT=/vm/out/critest.xml "$tree/hack/critest.sh"; }

# The Go tests; with -test.short what is tried hundreds of times elsewhere is tried some times.
part_units() {
	local t name begun rc=0
	install -m 0755 "$tree/hack/vm/go-in-guest.sh" /usr/local/bin/go
	sysctl -qw vm.nr_hugepages=4 # for the test of the metrics of huge pages
	for t in "$tree"/tests/*.test; do
		name=$(basename "$t" .test) begun=$(uptime_s)
		(cd "$tree/${name//__//}" && "$t" -test.short -test.timeout 30m -test.run "${RUN:-.}" ${VERBOSE:+-test.v}) >"/var/tmp/$name.log" 2>&1
		if [ $? = 0 ]; then
			echo "ok    ${name//__//} $(since "$begun") s"
		else
			rc=1
			echo "FAIL  ${name//__//} $(since "$begun") s"
			grep -E -A20 '^\s*--- FAIL|^panic:' "/var/tmp/$name.log" | head -80
		fi
		cp "/var/tmp/$name.log" /vm/out/
	done
	return $rc
}

echo "$(uname -sr), cgroup $(stat -fc %T /sys/fs/cgroup), $(systemctl --version | head -1), AppArmor $(cat /sys/module/apparmor/parameters/enabled 2>/dev/null), cgroup driver $driver"
for part; do
	begun=$(uptime_s)
	echo "== $part"
	"part_$part" || failed+=("$part")
	echo "== $part took $(since "$begun") s"
done
if [ ${#failed[@]} -gt 0 ]; then
	echo "FAIL: ${failed[*]}"
	exit 1
fi
echo "PASS: $* ($driver)"
