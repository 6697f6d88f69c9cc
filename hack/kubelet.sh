# shellcheck shell=bash
# What the scripts that run a real kubelet share. Sourced after lib.sh.

# kubelet_place makes the folders of a kubelet under $work, and $work/kubelet.sh,
# by which to start it: it shows the kubelet, and it alone, kernel settings as it
# wants them, so that it has no reason to write them. All others are read-only.
kubelet_place() {
	# Volumes that the kubelet mounts below $work must reach naru, and nothing else.
	mount --rbind "$work" "$work"
	mount --make-shared "$work"
	mkdir "$work/manifests" "$work/podlogs" "$work/volumeplugins" "$work/kubelet"
	mkdir "$work/sysctl"
	local name
	for name in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
		kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
		mkdir -p "$work/sysctl/$(dirname "${name%=*}")"
		echo "${name#*=}" >"$work/sysctl/${name%=*}"
	done
	mkdir "$work/varlogcontainers"
	cat >"$work/kubelet.sh" <<-EOF
	set -e
	# What is mounted from here on stays in this mount namespace; only \$work is shared.
	for m in / /proc /var /var/log; do mount --make-private \$m 2>/dev/null || true; done
	mount --bind /proc/sys /proc/sys
	mount -o remount,bind,ro /proc/sys
	cd $work/sysctl
	find . -type f | while read -r f; do mount --bind "\$f" "/proc/sys/\$f"; done
	mkdir -p /var/log/containers
	mount --bind $work/varlogcontainers /var/log/containers
	cd /
	exec "\$@"
	EOF
}
