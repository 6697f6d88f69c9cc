# shellcheck shell=bash
# A private naru: all its files under $work, in the run's network namespace.
# Sourced after lib.sh.
# Variables: NARU_CGROUP_DRIVER=systemd  where systemd is PID 1 and cgroup v2 is mounted

naru_endpoint='' # filled by naru_paths
cgroup_driver=${NARU_CGROUP_DRIVER:-cgroupfs}

naru_paths() { naru_endpoint=unix://$work/run/naru.sock; }

# naru_cgroup_parent is where the scripts put their pods. In a slice's name a
# dash would be a level of its own.
naru_cgroup_parent() {
	case $cgroup_driver in
	systemd) echo "${run_name//-/_}_pods.slice" ;;
	*) echo "/$run_name-pods" ;;
	esac
}

# What naru's configuration says of the network: ranges that are there at once.
naru_network='pod_cidr = ["10.85.0.0/16", "fd85::/64"]'

# naru_config writes its configuration, with every name leading to the registry, if
# one runs.
naru_config() {
	naru_paths
	mkdir -p "$work/certs.d" "$work/net.d"
	[ -z "${CNI:-}" ] || naru_cni >"$work/net.d/10-bridge.conflist"
	as_run "$work/run"
	[ -z "${registry:-}" ] || mirror_everything "$work/certs.d"
	cat >"$work/config.toml" <<-EOF
	version = 1
	root = "$work/root"
	run = "$work/run"
	socket = "$work/run/naru.sock"
	[log]
	verbosity = ${NARU_VERBOSITY:-2}
	[network]
	$naru_network
	[network.cni]
	conf_dir = "$work/net.d"
	bin_dirs = ["/usr/lib/cni"]
	[images]
	registry_dirs = ["$work/certs.d"]
	[cgroup]
	driver = "$cgroup_driver"
	default_parent = "$(naru_cgroup_parent)"
	[runtime]
	monitor = "$bin/naru-monitor"
	EOF
	[ -z "${HANDLER:-}" ] || printf '[handlers.%s]\nkind = "oci"\npath = "%s"\n' "$HANDLER" "$(type -P "$HANDLER")" >>"$work/config.toml"
}

# naru_up starts it and waits until it answers.
naru_up() {
	naru_config
	naru_start
	wait_for 20 answers || { tail -20 "$work/log/naru" >&2; die "naru does not come up"; }
}

naru_start() { spawn naru "$bin/naru" serve --config "$work/config.toml"; }

# naru_cni is a CNI configuration of Debian's plugins.
naru_cni() {
	cat <<-EOF
	{"cniVersion": "1.0.0", "name": "bridge", "plugins": [
	  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true, "capabilities": {"ipRanges": true},
	   "ipam": {"type": "host-local", "dataDir": "$work/leases", "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
	  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
	EOF
}

answers() { alive naru && "$bin/crictl" --runtime-endpoint "$naru_endpoint" --image-endpoint "$naru_endpoint" version; }

# naru_cli runs a naru command against the private daemon.
naru_cli() { in_ns "$bin/naru" --config "$work/config.toml" "$@"; }

# naru_down stops the daemon and its monitor and undoes what a running node
# keeps: namespaces' pins and the nftables table.
naru_down() {
	halt naru
	local pid n=0 monitors=()
	for pid in $(cat "$svc_cgroup/cgroup.procs" 2>/dev/null); do
		case $(tr '\0' ' ' <"/proc/$pid/cmdline") in naru-monitor\ keeper\ *) monitors+=("$pid") ;; esac
	done
	for pid in "${monitors[@]}"; do
		# The keeper ends on SIGTERM when it keeps nothing, and its worker with it.
		kill "$pid" 2>/dev/null || true
		while ! ended "$pid" && [ $n -lt 40 ]; do
			n=$((n + 1))
			sleep 0.05
		done
	done
	[ "$cgroup_driver" != systemd ] || systemctl stop "$(naru_cgroup_parent)"
	for c in $(cgroups_of "$run_name-pods*"); do find "$c" -depth -type d -exec rmdir {} + 2>/dev/null || true; done
	unmount_below "$work/run"
}
