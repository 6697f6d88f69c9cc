#!/bin/bash
# Runs Kubernetes' own CRI tests (critest) against naru: a daemon of its own on
# a temporary root, in a network namespace of its own, with images made here
# and served from a registry on loopback. Nothing on the machine is changed.
#   hack/critest.sh [critest flags]
# Variables: PEER=containerd   run against Debian's containerd instead
#            HANDLER=runc      pods with this runtime handler, an OCI runtime of
#                              that name in PATH
#            PARALLEL=2        test nodes (1 = no ginkgo command)
#            FOCUS='text'      only the specs whose name matches
#            CNI=1             the pods' network by Debian's CNI plugins
#            LEAST=105         how many specs must pass
#            REPORT=FILE       where to put the JUnit report, and all logs beside it
#            BENCHMARK=20      instead of the tests, critest's benchmarks with
#                              so many pods, containers and images
#            KEEP_FAILED=1     keep the logs of a run that failed
. "$(dirname "$0")/lib.sh"
. "$top/hack/naru.sh"
. "$top/hack/containerd.sh"

need_root
need ip nsenter unshare awk
parallel=${PARALLEL:-2}
target=${PEER:-naru}
[ -z "${CNI:-}" ] || need /usr/lib/cni/bridge iptables

# The one spec with a digest in it asks for an image of 2017 that nobody can
# make again: give it the digest of ours, the only change to critest.
localise_critest() {
	local digest
	digest=$("$bin/testimages" list "$set" | awk '$1 ~ /test-image-digest/ {print $2}')
	"$bin/testimages" replace --from sha256:9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf \
		--to "$digest" "$bin/critest" "$work/critest"
}

before_end() {
	[ ! -e "$work/crictl.yaml" ] || timeout 60 nsenter --net="$netns" "$bin/crictl" --config "$work/crictl.yaml" rmp -fa >/dev/null 2>&1
	if [ "$1" != 0 ] && [ -s "$work/log/$target" ] && [ -n "${VERBOSE:-}" ]; then tail -50 "$work/log/$target" >&2; fi
}

t=$EPOCHREALTIME
set=$(images critest)
work_begin critest
machine_state >"$work/before"
localise_critest
registry_up "$set"
runtime_up
say "critest against $(crictl version | awk -F': *' '/RuntimeName|RuntimeVersion/ {printf "%s ", $2}')(ready after $(since "$t") s)"

# The image endpoint, too: critest would take it from /etc/crictl.yaml.
flags=(-config /nonexistent -runtime-endpoint "$endpoint" -image-endpoint "$endpoint" -ginkgo.no-color
	"-ginkgo.junit-report=$work/junit.xml" "-ginkgo.timeout=${CRITEST_TIMEOUT:-10m}")
[ "$parallel" = 1 ] || flags+=("-parallel=$parallel")
if [ -n "${HANDLER:-}" ]; then
	need "$HANDLER"
	flags+=("-runtime-handler=$HANDLER")
fi
[ -z "${FOCUS:-}" ] || flags+=("-ginkgo.focus=$FOCUS")
if [ -n "${BENCHMARK:-}" ]; then
	parallel=1 LEAST=${LEAST:-5}
	image=$("$bin/testimages" list "$set" | awk '$1 ~ /busybox/ {print $1; exit}')
	cat >"$work/benchmark.yaml" <<-EOF
	containersNumber: $BENCHMARK
	containersNumberParallel: 2
	containerBenchmarkTimeoutSeconds: 120
	podsNumber: $BENCHMARK
	podsNumberParallel: 2
	podBenchmarkTimeoutSeconds: 120
	imagesNumber: $BENCHMARK
	imagesNumberParallel: 2
	imageBenchmarkTimeoutSeconds: 120
	imagePullingBenchmarkImage: $image
	imageListingBenchmarkImages: ["$image"]
	podContainerStartBenchmarkTimeoutSeconds: 120
	EOF
	flags=(-config /nonexistent -runtime-endpoint "$endpoint" -ginkgo.no-color "-ginkgo.junit-report=$work/junit.xml" "-ginkgo.timeout=${CRITEST_TIMEOUT:-10m}"
		-benchmark "-benchmarking-params-file=$work/benchmark.yaml" "-benchmarking-output-dir=$work/log")
fi
# What critest makes in the temporary folder goes away with ours.
mkdir "$work/tmp"
rc=0
t=$EPOCHREALTIME
(cd "$work/tmp" && TMPDIR=$work/tmp PATH=$bin:$PATH in_ns "$work/critest" "${flags[@]}" "$@") >"$work/log/critest" 2>&1 || rc=$?
say "critest took $(since "$t") s and ended with $rc"
[ -s "$work/junit.xml" ] || { tail -40 "$work/log/critest" >&2; die "critest left no report"; }
if [ -n "${REPORT:-}" ]; then cp "$work/junit.xml" "$REPORT"; rm -rf "$REPORT.logs"; cp -r "$work/log" "$REPORT.logs"; fi

check=(--expected "$top/hack/critest-${HANDLER:-$target}.expected")
least=${LEAST:-105}
if [ -n "${FOCUS:-}${BENCHMARK:-}" ] || [ "$target" != naru ]; then check=() least=${LEAST:-1}; fi
rc=0
"$bin/junitcheck" "${check[@]}" --least "$least" "$work/junit.xml" || rc=$?
if [ $rc != 0 ]; then
	# The details of what failed, as critest wrote them.
	grep -A25 -E '^\s*\[(FAIL|PANICKED|TIMEDOUT)' "$work/log/critest" | tail -150 || true
fi

# critest itself leaves SysV segments and, after failures, mounts.
crictl rmp -fa >/dev/null 2>&1 || true
runtime_down
unmount_below "$work/tmp"
remove_sysv() {
	comm -13 <(sort -u "$work/before") <(machine_state | sort -u) | awk '$1 == "shm" {print "-m " $2} $1 == "msg" {print "-q " $2} $1 == "sem" {print "-s " $2}' |
		while read -r kind id; do ipcrm "$kind" "$id" || true; done
}
remove_sysv
exit $rc
