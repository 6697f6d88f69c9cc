#!/bin/bash
# The real kubelet drives naru through everything that it asks of a runtime:
# kubelete2e/ has the pods and what is looked at. Both run in a network namespace
# of their own, on temporary folders; the host-wide kernel settings that a kubelet
# writes are masked for it.
#   hack/kubelet-e2e.sh
# Variables: RESULTS=FILE     where the page of results goes (bin/kubelet-e2e.md)
#            KEEP_FAILED=1    keep the logs of a run that failed
. "$(dirname "$0")/lib.sh"
. "$top/hack/naru.sh"
. "$top/hack/kubelet.sh"

need_root
need ip nsenter unshare awk

before_end() {
	for c in $(cgroups_of "$run_name-pods*"); do kill_cgroup "$c"; done
}

begun=$EPOCHREALTIME
layout=$(images kubelet)
machine_state >"${TMPDIR:-/tmp}/naru-kubelet-before.$$"
work_begin kubelet
mv "${TMPDIR:-/tmp}/naru-kubelet-before.$$" "$work/before"
kubelet_place
cp "$bin/kubelete2e" "$work/agent"
registry_up "$layout"
naru_config
crictl_for "$naru_endpoint"
make_cgroup "$run_name-pods"
(in_place "$bin/kubelete2e" run --work "$work" --bin "$bin" --cgroup "/$run_name-pods" --expected "$top/hack/kubelet-naru.expected" --dropins "$top/packaging/kubelet.conf.d" --results "${RESULTS:-$bin/kubelet-e2e.md}") ||
	die "the kubelet and naru did not agree"
note_namespaces
naru_down
halt registry
for c in $(cgroups_of "$run_name-pods*"); do kill_cgroup "$c"; done
place_empty
unmount_below "$work"
left=$(leftovers "$work/before")
[ -z "$left" ] || { warn "left on this machine:"; say "$left"; exit 1; }
say "PASS: kubelet-e2e in $(since "$begun") s"
