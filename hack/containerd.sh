# shellcheck shell=bash
# Debian's containerd as a peer to compare with, private to one run: all its
# files under $work, in the run's network namespace. Sourced after lib.sh.
# Variables: CONTAINERD, RUNC, CNI_BIN choose other builds.

# containerd_up [DIR] starts it and sets $containerd_endpoint. DIR holds the
# hosts.toml files.
containerd_up() {
	local dir=$work/containerd certs=${1:-} set pause
	need containerd runc ctr
	mkdir -p "$dir/cni"
	as_run "$dir/state"
	cat >"$dir/cni/10-bridge.conflist" <<-EOF
	{"cniVersion": "1.0.0", "name": "peer", "plugins": [
	  {"type": "bridge", "bridge": "peer0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
	   "ipam": {"type": "host-local", "dataDir": "$dir/ipam",
	            "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
	  {"type": "portmap", "capabilities": {"portMappings": true}}]}
	EOF
	cat >"$dir/config.toml" <<-EOF
	version = 2
	root = "$dir/root"
	state = "$dir/state"
	disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
	  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper",
	  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
	[grpc]
	  address = "$dir/containerd.sock"
	[plugins."io.containerd.internal.v1.opt"]
	  path = "$dir/opt"
	[plugins."io.containerd.grpc.v1.cri"]
	  sandbox_image = "localhost/cribench/pause:1"
	  stream_server_address = "127.0.0.1"
	  stream_server_port = "0"
	  restrict_oom_score_adj = true  # for machines without CAP_SYS_RESOURCE
	  [plugins."io.containerd.grpc.v1.cri".registry]
	    config_path = "$certs"
	  [plugins."io.containerd.grpc.v1.cri".cni]
	    bin_dir = "${CNI_BIN:-/usr/lib/cni}"
	    conf_dir = "$dir/cni"
	  [plugins."io.containerd.grpc.v1.cri".containerd]
	    snapshotter = "overlayfs"
	    default_runtime_name = "runc"
	    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
	      runtime_type = "io.containerd.runc.v2"
	      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
	        BinaryName = "$(command -v "${RUNC:-runc}")"
	        SystemdCgroup = $([ "${NARU_CGROUP_DRIVER:-cgroupfs}" = systemd ] && echo true || echo false)
	EOF
	containerd_endpoint=unix://$dir/containerd.sock
	containerd_start
	wait_for 20 ctr --address "$dir/containerd.sock" version ||
		{ tail -5 "$work/log/containerd" >&2; die "containerd does not come up"; }
	set=$(images bench)
	for pause in pause busybox; do
		"$bin/testimages" archive "$set" "localhost/cribench/$pause:1" "$work/$pause.tar"
		ctr --address "$dir/containerd.sock" -n k8s.io images import "$work/$pause.tar" >/dev/null
	done
}

containerd_start() { spawn containerd "$(command -v "${CONTAINERD:-containerd}")" --config "$work/containerd/config.toml"; }

# runtime_up starts the runtime under test, naru or the one that PEER names,
# and sets $endpoint. runtime_down stops it.
runtime_up() {
	case ${PEER:-naru} in
	naru) naru_up; endpoint=$naru_endpoint ;;
	containerd)
		mirror_everything "$work/certs.d"
		containerd_up "$work/certs.d"
		endpoint=$containerd_endpoint
		;;
	*) die "PEER=$PEER is not known" ;;
	esac
	crictl_for "$endpoint"
}

# runtime_again starts it once more after its daemon was killed.
runtime_again() { "${PEER:-naru}_start"; }

runtime_down() { case ${PEER:-naru} in naru) naru_down ;; *) halt containerd ;; esac; }
