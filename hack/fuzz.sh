#!/bin/bash
# Runs every fuzz target of the module for a while each.
#   hack/fuzz.sh 30s [PACKAGE...]
. "$(dirname "$0")/lib.sh"
go=${GO:-go}
time=${1:-30s}
shift || true
cd "$top"
rc=0
while read -r package target; do
	say "fuzzing $package $target for $time"
	"$go" test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$package" || rc=1
done < <("$go" list -f '{{$p := .ImportPath}}{{$d := .Dir}}{{range .TestGoFiles}}{{$p}} {{$d}}/{{.}}{{"\n"}}{{end}}{{range .XTestGoFiles}}{{$p}} {{$d}}/{{.}}{{"\n"}}{{end}}' "${@:-./...}" |
	while read -r package file; do
		[ -z "$package" ] || sed -nE "s|^func (Fuzz[A-Za-z0-9_]+)\(.*|$package \1|p" "$file"
	done)
exit $rc
