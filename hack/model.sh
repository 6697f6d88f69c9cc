#!/bin/bash
# Lets the reference model (hack/model) judge naru or another runtime through its
# CRI socket: concurrent, duplicate and cancelled requests, every answer, every
# log line, and what is left on the host.
#   hack/model.sh
# Variables: PEER=containerd   judge Debian's containerd instead
#            DURATION=60s      how long new pods are begun
#            KILL=2            kill -9 the daemon about every so many seconds,
#                              and start it again
#            TOLERATE='a|b'    a refusal with one of these texts is tried again
#            WORKERS=8  SEED=N
#            JSON=FILE         where to put the report
. "$(dirname "$0")/lib.sh"
. "$top/hack/naru.sh"
. "$top/hack/containerd.sh"

need_root
need ip nsenter unshare awk nft
target=${PEER:-naru}

work_begin model
registry_up "$(images bench)"
runtime_up
crictl pull localhost/cribench/busybox:1 >/dev/null
parent=/$run_name-pods
mkdir "$work/logs"
flags=(--endpoint "$endpoint" --image localhost/cribench/busybox:1 --logs "$work/logs"
	--cgroup-parent "$parent" --cgroup "${parent#/}" --folders "$work/run,$work/containerd/state"
	--duration "${DURATION:-60s}" --workers "${WORKERS:-8}" --seed "${SEED:-0}" --settle 60s --patience 120s)
case $target in
naru) flags+=(--links naru --nft-table naru) ;;
containerd) flags+=(--links veth) ;;
esac
[ -z "${TOLERATE:-}" ] || flags+=(--tolerate "$TOLERATE")
make_cgroup "${parent#/}"

spawn model "$bin/crimodel" "${flags[@]}"
kills=0
while alive model; do
	sleep "${KILL:-1}.$((RANDOM % 10))"
	if [ -n "${KILL:-}" ] && alive model; then
		pid=$(cat "$work/pids/$target")
		# bash would tell of a job that was killed.
		{ halt "$target" KILL; wait "$pid" || true; } 2>/dev/null
		runtime_again
		kills=$((kills + 1))
	fi
done
rc=0
wait "$(cat "$work/pids/model")" || rc=$?
awk '/^{/ {on = 1} on' "$work/log/model" >"$work/report"
[ -s "$work/report" ] || { cat "$work/log/model" >&2; die "the model left no report"; }
[ -z "${JSON:-}" ] || cp "$work/report" "$JSON"
say "$target, its daemon killed $kills times:"
cat "$work/report"
runtime_down
exit $rc
