#!/bin/bash
# Runs, inside the test machine (a clean Debian 12 with systemd, cgroup v2 and
# AppArmor under QEMU): the demo, the Go tests, the AppArmor specs of critest
# and the systemd units. Everything is compiled outside: the machine is
# emulated, and process starts are about ten times slower than here.
#   hack/vm/test.sh [bookworm|backports]
# Variables: PARTS="demo units service apparmor critest"   only some of it
#            UNITS="pod runtime/monitor"   only these packages in the part units
#            RUN='TestPod'  only these tests of the part units; VERBOSE=1 has them tell more
#            NARU_CGROUP_DRIVER=systemd   for demo, critest and test/ring; the units choose by themselves
#            VM_TIMEOUT=5400  seconds for all of it
#            OUT=DIR          where logs of the guest go
. "$(dirname "$0")/../lib.sh"
need_root
need qemu-system-x86_64 mke2fs
image=${1:-bookworm}
go=${GO:-go}
parts=${PARTS:-demo service apparmor units}

stage=$(mktemp -d "${TMPDIR:-/tmp}/naru-vm.XXXXXX")
trap 'rm -rf "$stage"' EXIT
mkdir -p "$stage/tests" "$stage/images"
# The tree itself: scripts, units, test data.
(cd "$top" && tar -c --exclude=./.git --exclude=./bin --exclude=./tools .) | tar -x -C "$stage"
mkdir "$stage/bin"
for tool in naru naru-monitor crictl critest ginkgo testimages junitcheck; do
	cp "$(readlink -f "$bin/$tool")" "$stage/bin/$tool"
done
for set in demo bench critest; do
	case $set-$parts in critest-*apparmor* | critest-*critest* | demo-* | bench-*) cp -r "$(images $set)" "$stage/images/$set" ;; esac
done

# compile_tests builds one test program for each package that has tests. The
# one at the top of the tree reads the source with the go command: not there.
compile_tests() {
	local package dir name
	(cd "$top" && "$go" list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}} {{.Dir}}{{end}}' ./...) |
		while read -r package dir; do
			[ "$dir" != "$top" ] || continue
			name=${dir#"$top"/}
			case " ${UNITS:-$name} " in *" $name "*) ;; *) continue ;; esac
			(cd "$top" && CGO_ENABLED=0 "$go" test -c -o "$stage/tests/${name//\//__}.test" "$package")
		done
}
# prebuild makes the programs that tests build while they run.
prebuild() {
	local dir name arch
	mkdir -p "$stage/prebuilt"
	(cd "$top" && { echo cmd/shim; echo cmd/monitor; find . -path '*/testdata/*' -name '*.go' -not -path './hack/*' -printf '%P\n' |
		xargs -r grep -l '^package main$' | xargs -r -n1 dirname; } | sort -u) |
		while read -r dir; do
			name=${dir//\//__} arch=
			case $dir in */i386) arch=386 ;; esac
			(cd "$top" && CGO_ENABLED=0 GOARCH=$arch "$go" build -o "$stage/prebuilt/$name" "./$dir")
		done
	(cd "$top/hack" && CGO_ENABLED=0 "$go" build -o "$stage/prebuilt/hack__model" ./model)
	[ ! -e "$top/test/ring/testdata/evil.c" ] ||
		gcc -static -O1 -o "$stage/prebuilt/test__ring__evil" "$top/test/ring/testdata/evil.c" -lpthread
}
case " $parts " in
*" units "*)
	say "compiling the tests"
	compile_tests
	prebuild
	;;
esac
say "starting the test machine ($image) for: $parts"
VM_CACHE=$cache/vm "$top/hack/vm/runvm.sh" -i "$image" -s "$stage:naru" -t "${VM_TIMEOUT:-5400}" ${OUT:+-o "$OUT"} \
	-- "RUN=$(printf %q "${RUN:-.}") VERBOSE=${VERBOSE:-} NARU_CGROUP_DRIVER=${NARU_CGROUP_DRIVER:-} exec bash /vm/naru/hack/vm/guest.sh $parts"
