#!/bin/bash
# Runs "go build" or "go test -c" and shows how far it is where a person looks
# on: a first build compiles hundreds of packages and would look stuck.
#   hack/gobuild.sh TITLE go build [flags] PACKAGE
set -euo pipefail
title=$1
shift
if [ ! -t 2 ]; then
	[ -z "$title" ] || echo "$title"
	exec "$@"
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
begun=$SECONDS
# -v prints the name of each package as it is compiled.
if "${@:1:2}" -v "${@:3}" 2>&1 | tee "$log" | while read -r line; do
	case $line in
	\#* | *' '*) ;;
	*) n=$((${n:-0} + 1)) && printf '\r\e[K%s: %d packages, %d s  %.60s' "$title" "$n" $((SECONDS - begun)) "$line" >&2 ;;
	esac
done; then
	printf '\r\e[K' >&2
	if [ -s "$log" ]; then echo "$title: done in $((SECONDS - begun)) s"; fi
else
	printf '\r\e[K' >&2
	grep -vE '^[A-Za-z0-9./_~-]+$' "$log" >&2 || true
	exit 1
fi
