# Functions that the scripts in this folder share. It is sourced, not run.
# shellcheck shell=bash
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=$top/bin
cache=${NARU_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/naru}
export LC_ALL=C

# Colours and self-replacing lines only where a person looks on.
bold='' dim='' red='' green='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
	bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'
fi

say() { printf '%s\n' "$*"; }
warn() { printf '%s%s%s\n' "$red" "$*" "$plain" >&2; }
die() { warn "${0##*/}: $*"; exit 1; }

# since START prints the seconds since START, an $EPOCHREALTIME.
since() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN {printf "%.2f", b - a}'; }

# need PROGRAM... ends with one sentence that names what is missing.
need() {
	local p missing=()
	for p in "$@"; do command -v "$p" >/dev/null || missing+=("$p"); done
	[ ${#missing[@]} -eq 0 ] || die "missing: ${missing[*]} (on Debian: apt-get install $(for p in "${missing[@]}"; do package_of "$p"; done | sort -u | tr '\n' ' '))"
}

package_of() {
	case $1 in
	ip | ss) echo iproute2 ;;
	nft) echo nftables ;;
	nsenter | unshare) echo util-linux ;;
	qemu-system-x86_64) echo qemu-system-x86 ;;
	mke2fs) echo e2fsprogs ;;
	containerd | ctr) echo containerd ;;
	dpkg-source) echo dpkg-dev ;;
	/usr/lib/cni/*) echo containernetworking-plugins ;;
	busybox) echo busybox-static ;;
	*) echo "$1" ;;
	esac
}

need_root() { [ "$(id -u)" = 0 ] || die "needs root: it makes namespaces, mounts and cgroups"; }

# work_begin NAME makes the folder that everything of this run lives in, and
# the network namespace that everything of it runs in. work_end undoes it; it
# runs on every way out.
work_begin() {
	run_name=naru-$1-$$
	work=$(mktemp -d "${TMPDIR:-/tmp}/naru-$1.XXXXXX")
	chmod 755 "$work"
	mkdir "$work/pids" "$work/log"
	trap work_end EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	place main
}

# place NAME makes a place for daemons: a network namespace, which is a node of
# its own (loopback, one address, a default route), and a cgroup, by which its
# processes are found again whatever becomes of them and their CPU time is
# counted. It becomes the current one ($netns, $svc_cgroup).
place() {
	new_netns "$1"
	if in_ns ip link add uplink0 type dummy 2>/dev/null; then
		in_ns ip address add "$node_ip/24" dev uplink0
		in_ns ip link set uplink0 up
		in_ns ip route add default via 192.0.2.1
	else
		in_ns ip address add "$node_ip/32" dev lo
	fi
	if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
		svc_cgroup=/sys/fs/cgroup/$run_name-$1-svc
	else
		svc_cgroup=$(awk '$3 == "cgroup" && $4 ~ /(^|,)cpuacct(,|$)/ {print $2; exit}' /proc/mounts)/$run_name-$1-svc
	fi
	mkdir "$svc_cgroup"
}
node_ip=192.0.2.10

# new_netns NAME makes a network namespace with a loopback, which becomes the current one.
new_netns() {
	netns=$work/netns-$1
	touch "$netns"
	unshare --net="$netns" true
	in_ns ip link set lo up
}

in_ns() { nsenter --net="$netns" "$@"; }

# in_place PROGRAM... becomes a program in this run's namespace and cgroup: for
# a shell that has nothing else to do.
in_place() {
	# shellcheck disable=SC2016
	exec sh -c 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"' sh "$svc_cgroup" nsenter --net="$netns" "$@"
}

# spawn NAME PROGRAM... starts a daemon of this run, in its namespace and cgroup.
spawn() {
	local name=$1
	shift
	in_place setsid "$@" >"$work/log/$name" 2>&1 </dev/null &
	echo $! >"$work/pids/$name"
}

alive() { [ -e "$work/pids/$1" ] && ! ended "$(cat "$work/pids/$1")"; }

# wait_for SECONDS COMMAND... polls.
wait_for() {
	local n=$(($1 * 20))
	shift
	while [ $n -gt 0 ]; do
		if "$@" >/dev/null 2>&1; then return 0; fi
		sleep 0.05
		n=$((n - 1))
	done
	return 1
}

# ended PID says whether a process is over; a zombie that nobody has reaped yet is.
ended() {
	local stat
	stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
	case ${stat##*) } in Z* | X*) return 0 ;; *) return 1 ;; esac
}

# halt NAME [SIGNAL] stops a daemon that spawn started and waits for its end.
halt() {
	[ -e "$work/pids/$1" ] || return 0
	local pid
	pid=$(cat "$work/pids/$1")
	rm "$work/pids/$1"
	kill -"${2:-TERM}" "$pid" 2>/dev/null || return 0
	local n=0
	while ! ended "$pid"; do
		n=$((n + 1))
		[ $n -lt 400 ] || { warn "$1 ($pid) does not end: SIGKILL"; kill -KILL "$pid" 2>/dev/null || true; }
		[ $n -lt 500 ] || break
		sleep 0.05
	done
}

# cgroups_of NAME lists the folders of that name in every hierarchy.
cgroups_of() { find /sys/fs/cgroup -mindepth 1 -maxdepth 2 -type d -name "$1" 2>/dev/null || true; }

# make_cgroup NAME makes a cgroup in every hierarchy, ready to have children.
make_cgroup() {
	local root file
	for root in $(awk '$3 == "cgroup" || $3 == "cgroup2" {print $2}' /proc/mounts | sort -u); do
		mkdir -p "$root/$1"
		for file in cpuset.cpus cpuset.mems; do # v1: empty ones take no process
			if [ -e "$root/$1/$file" ] && [ ! -s "$root/$1/$file" ]; then cat "$root/$file" >"$root/$1/$file" 2>/dev/null || true; fi
		done
	done
}

# kill_cgroup DIR ends every process below DIR and removes it.
kill_cgroup() {
	local dir=$1 n=0
	while [ -d "$dir" ] && [ $n -lt 100 ]; do
		find "$dir" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u | xargs -r kill -KILL 2>/dev/null || true
		find "$dir" -depth -type d -exec rmdir {} + 2>/dev/null || true
		n=$((n + 1))
		[ ! -d "$dir" ] || sleep 0.05
	done
}

# unmount_below DIR undoes every mount under DIR, the last one first.
unmount_below() {
	local point
	tac /proc/self/mountinfo | awk -v d="$1" '$5 == d || index($5, d "/") == 1 {print $5}' | while read -r point; do
		umount -l "$(printf '%b' "$point")" 2>/dev/null || true
	done
}

# as_run DIR makes DIR what /run is on a real machine: a tmpfs.
as_run() {
	mkdir -p "$1"
	awk -v d="$1" '$5 == d {found = 1} END {exit !found}' /proc/self/mountinfo || mount -t tmpfs -o mode=0700,nosuid,nodev tmpfs "$1"
}

# place_empty fails, and names them, if processes of the current place are left;
# else it removes the place's cgroup.
place_empty() {
	local n=0 pids
	while pids=$(cat "$svc_cgroup/cgroup.procs") && [ -n "$pids" ] && [ $n -lt 60 ]; do
		n=$((n + 1))
		sleep 0.05
	done
	# shellcheck disable=SC2086
	[ -z "$pids" ] || { echo "processes left:"; ps -o pid,stat,args -p "$(echo $pids | tr ' ' ,)"; return 1; }
	rmdir "$svc_cgroup"
}

work_end() {
	local rc=$? name
	trap - EXIT
	set +e
	if [ -n "${work:-}" ]; then
		if declare -F before_end >/dev/null; then before_end "$rc"; fi
		for name in "$work"/pids/*; do
			[ ! -e "$name" ] || halt "${name##*/}"
		done
		for name in $(cgroups_of "$run_name*"); do kill_cgroup "$name"; done
		if [ -n "${KEEP:-}" ] || { [ "$rc" != 0 ] && [ -n "${KEEP_FAILED:-}" ]; }; then
			cp -r "$work/log" "$work.log"
			say "logs kept in $work.log"
		fi
		unmount_below "$work"
		rm -rf --one-file-system "$work"
		[ ! -e "$work" ] || warn "$work could not be removed"
	fi
	exit "$rc"
}

# machine_state prints what a run must leave as it was: mounts, network
# namespaces, links, cgroups, nftables tables, SysV segments. One line each.
machine_state() {
	awk '{print "mount " $5}' /proc/self/mountinfo
	awk '/ - nsfs / {print "namespace " $4}' /proc/self/mountinfo
	for ns in /proc/[0-9]*/ns/net; do readlink "$ns" 2>/dev/null | sed 's/^/namespace /' || true; done
	ip -o link show 2>/dev/null | awk -F': ' '{print "link " $2}'
	find /sys/fs/cgroup -mindepth 1 -type d 2>/dev/null | sed 's/^/cgroup /'
	if command -v nft >/dev/null; then nft list tables 2>/dev/null | sed 's/^/nft /'; fi
	ipcs -m 2>/dev/null | awk '$1 ~ /^0x/ {print "shm " $2}' || true
	ipcs -q 2>/dev/null | awk '$1 ~ /^0x/ {print "msg " $2}' || true
	ipcs -s 2>/dev/null | awk '$1 ~ /^0x/ {print "sem " $2}' || true
}

# note_namespaces remembers which namespaces are this run's, to look for them
# when all is over. Call it while pods run.
note_namespaces() {
	awk -v d="$work/" 'index($5, d) == 1 && / - nsfs / {print "namespace " $4}' /proc/self/mountinfo >>"$work/namespaces"
}

# ours picks, from lines of machine_state, what can be of this run. Others may
# be at work on the machine meanwhile; with STRICT=1 nobody is, and every
# difference counts.
ours() {
	if [ -n "${STRICT:-}" ]; then cat; return; fi
	awk -v work="$work" -v run="$run_name" -v list="$work/namespaces" '
		BEGIN { while ((getline line < list) > 0) own[line] = 1 }
		$1 == "namespace" { if ($0 in own) print; next }
		$1 == "shm" || $1 == "msg" || $1 == "sem" { next }
		index($0, work) || index($0, run) { print; next }
		$1 ~ /^(link|nft)$/ && /naru/ { print; next }
		# A name of naru that is not that of another run.
		/naru/ && !/naru-[a-z]+[-.]/ && !/\/Test/ { print }'
}

# leftovers BEFORE prints what is there now and was not in the file BEFORE. It
# gives the kernel some seconds, since namespaces go away asynchronously.
leftovers() {
	local n new
	for n in 1 2 3 4 5 6; do
		new=$(comm -13 <(sort -u "$1") <(machine_state | sort -u) | ours)
		[ -n "$new" ] || return 0
		sleep "0.$n"
	done
	printf '%s\n' "$new"
}

# registry_up LAYOUT... serves image layouts on 127.0.0.1 inside the
# namespace and sets $registry to its address.
registry_up() {
	spawn registry "$bin/testimages" registry -v --listen 127.0.0.1:5000 --addr-file "$work/registry" "$@"
	wait_for 30 test -s "$work/registry" || { cat "$work/log/registry" >&2; die "the registry does not come up"; }
	registry=$(cat "$work/registry")
}

# mirror_everything DIR writes a hosts.toml that sends every registry name to ours.
mirror_everything() {
	mkdir -p "$1/_default"
	printf '[host."http://%s"]\n  capabilities = ["pull", "resolve"]\n' "$registry" >"$1/_default/hosts.toml"
}

# images SET prints the layout folder of a set of test images, made if need be.
images() {
	if [ -n "${NARU_IMAGES:-}" ]; then echo "$NARU_IMAGES/$1"; else "$bin/testimages" build --cache "$cache/testimages" "$1"; fi
}

crictl() { in_ns "$bin/crictl" --config "$work/crictl.yaml" "$@"; }

# crictl_for ENDPOINT writes the configuration that crictl uses.
crictl_for() {
	printf 'runtime-endpoint: %s\nimage-endpoint: %s\ntimeout: 60\n' "$1" "$1" >"$work/crictl.yaml"
}
