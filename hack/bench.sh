#!/bin/bash
# Compares naru with Debian's containerd and runc through their CRI sockets,
# interleaved in one run, and writes the table of docs/performance.md.
#   hack/bench.sh
# Variables: ROUNDS=5          rounds of each measure
#            RUN=pod,exec,...  measures (density, list, log and burst, too)
#            JSON=FILE         where to put the figures
#            ENFORCE=1         fail if a target is missed
#            DOC=1             put the table into docs/performance.md
. "$(dirname "$0")/lib.sh"
. "$top/hack/naru.sh"
. "$top/hack/containerd.sh"

need_root
need ip nsenter unshare awk containerd runc ctr gcc
rounds=${ROUNDS:-5}
json=${JSON:-$bin/bench.json}

before_end() {
	local endpoint
	for endpoint in "${naru_endpoint:-}" "${containerd_endpoint:-}"; do
		[ ! -S "${endpoint#unix://}" ] || "$bin/cribench" cleanup --endpoint "$endpoint" >/dev/null 2>&1
	done
}

work_begin bench
own=$netns own_svc=$svc_cgroup
place peer
containerd_up
netns=$own svc_cgroup=$own_svc
set=$(images bench)
registry_up "$set"
naru_up
crictl_for "$naru_endpoint"
crictl pull localhost/cribench/busybox:1 >/dev/null

compare() {
	local measure=$1
	shift
	"$bin/cribench" compare --run "$measure" --rounds "$rounds" --image localhost/cribench/busybox:1 \
		--endpoint containerd="$containerd_endpoint" --endpoint naru="$naru_endpoint" \
		--set containerd.proc-match='/containerd$' --set containerd.proc-match='/(containerd-shim[^/]*|runc|pause)$' \
		--set naru.proc-match='/naru$' --set naru.proc-match='/(memfd:)?naru-monitor' \
		--log-dir "$work/logs" --max-time 60m --json "$json" "$@"
}
rc=0
# One compare run for all: the report then holds every measure.
compare "${RUN:-pod,exec,density,list,log,burst}" --count "pod=10,exec=50,list=50,log=1" --pods 60 --base-pods 10 || rc=$?
say
"$bin/cribench" report ${ENFORCE:+--enforce} "$json" | tee "$work/table" || rc=$?
if [ -n "${DOC:-}" ]; then
	awk -v table="$work/table" '
		/^<!-- table -->$/ { print; print ""; while ((getline line < table) > 0) print line; print ""; skip = 1; next }
		/^<!-- \/table -->$/ { skip = 0 }
		!skip' "$top/docs/performance.md" >"$work/performance.md"
	cp "$work/performance.md" "$top/docs/performance.md"
fi
say
say "the figures are in $json"
naru_down
halt containerd
exit $rc
