#!/bin/bash
# A Kubernetes cluster with naru beneath, on this machine: clustere2e/ has what is
# done with it. The control plane runs in one network namespace, which is also the
# router between those of the two nodes. Each node has a naru and a kubelet with
# folders and cgroups of its own; the host-wide kernel settings that a kubelet writes
# are masked for it.
#   hack/cluster-e2e.sh
# Variables: RESULTS=FILE     where the page of results goes (bin/cluster-e2e.md)
#            REPLICAS=100     size of the Deployment whose start is measured; 0: none
#            PARTS=jobs,many  some parts only, see clustere2e --help
#            KEEP_FAILED=1    keep the logs of a run that failed
. "$(dirname "$0")/lib.sh"
. "$top/hack/naru.sh"
. "$top/hack/kubelet.sh"

need_root
need ip nsenter unshare awk nft runc

# The nodes' ranges come from the API server, by the kubelet.
naru_network='pod_cidr = ["auto"]
	non_masquerade = ["10.244.0.0/16", "fd00:10:244::/56"]'
HANDLER=runc
router_ip6=2001:db8::10

# node NAME NUMBER makes the place of a node: a network namespace that has nothing but
# a link to the router, the current one; a folder, with a registry on its loopback; a
# cgroup.
node() {
	local router=$netns name=$1 ip4=198.51.100.$2 ip6=2001:db8::$2 netns= to
	new_netns "$name"
	in_ns ip link add uplink0 type veth peer name "to-$name" netns "$router"
	in_ns ip address add "$ip4/32" dev uplink0
	in_ns ip address add "$ip6/128" dev uplink0 nodad
	in_ns ip link set uplink0 up
	# IPv6 asks for neighbours on the interface that has the address.
	netns=$router in_ns ip address add "$router_ip6/128" dev "to-$name" nodad
	netns=$router in_ns ip link set "to-$name" up
	for to in "$node_ip" "$router_ip6"; do
		in_ns ip route add "$to" dev uplink0
		in_ns ip route add default via "$to" dev uplink0
	done
	netns=$router in_ns ip route add "$ip4" dev "to-$name" src "$node_ip"
	netns=$router in_ns ip route add "$ip6" dev "to-$name" src "$router_ip6"
	# Of this namespace alone: a new one has it on where the module is loaded.
	# shellcheck disable=SC2016
	in_ns sh -c 'f=/proc/sys/net/bridge/bridge-nf-call-iptables; [ ! -e $f ] || echo 0 >$f'

	mkdir "$work/$name" "$work/$name/pids" "$work/log/$name"
	ln -s "../log/$name" "$work/$name/log"
	local work=$work/$name run_name=$run_name-$name
	kubelet_place
	registry_up "$layout"
	naru_config
	make_cgroup "$run_name-pods"
}

# nodes_end ends what node has started and what naru has.
nodes_end() {
	local c name
	for name in a b; do work=$work/$name halt registry; done
	for c in $(cgroups_of "$run_name-[ab]-pods"); do kill_cgroup "$c"; done
}
before_end() { nodes_end; }

begun=$EPOCHREALTIME
layout=$(images kubelet)
machine_state >"${TMPDIR:-/tmp}/naru-cluster-before.$$"
work_begin cluster
mv "${TMPDIR:-/tmp}/naru-cluster-before.$$" "$work/before"
in_ns sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
node a 11
node b 12
(in_place "$bin/clustere2e" --work "$work" --bin "$bin" --run "$run_name" --replicas "${REPLICAS:-100}" --parts "${PARTS:-}" --expected "$top/hack/kubelet-naru.expected" --dropins "$top/packaging/kubelet.conf.d" --results "${RESULTS:-$bin/cluster-e2e.md}") ||
	die "the cluster and naru did not agree"
note_namespaces
naru_down
nodes_end
place_empty
unmount_below "$work"
left=$(leftovers "$work/before")
[ -z "$left" ] || { warn "left on this machine:"; say "$left"; exit 1; }
say "PASS: cluster-e2e in $(since "$begun") s"
