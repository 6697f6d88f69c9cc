#!/bin/bash
# Shows naru at work, step by step, with the real crictl: two images made from
# Debian packages, a registry on loopback, a pod of two containers with a host
# port, and everything taken down again. All of it happens in a temporary
# folder and in a network namespace of its own; the last step proves that
# nothing of it is left on the machine.
. "$(dirname "$0")/lib.sh"
. "$top/hack/naru.sh"
. "$top/hack/containerd.sh"

need_root
need ip nsenter unshare awk find

number=0

# step TITLE FUNCTION runs one step and says how long it took.
step() {
	local title=$1 t=$EPOCHREALTIME rc=0
	shift
	number=$((number + 1))
	printf '%s%2d. %s%s\n' "$bold" "$number" "$title" "$plain"
	# Not in a condition: set -e must hold inside the step.
	set +e
	(
		set -e
		"$@"
	) >"$work/step" 2>&1
	rc=$?
	set -e
	# crictl clears the screen before some of its tables.
	sed "s/\x1b\[[0-9;]*[A-Za-z]//g; s/^/    $dim/; s/\$/$plain/" "$work/step"
	if [ $rc != 0 ]; then
		warn "    failed after $(since "$t") s"
		tail -20 "$work/log/naru" 2>/dev/null | sed 's/^/    naru: /' >&2 || true
		exit 1
	fi
	printf '    %sdone in %s s%s\n' "$green" "$(since "$t")" "$plain"
}

fetch() {
	if command -v curl >/dev/null; then in_ns curl -sS --max-time 10 "$1"; else in_ns busybox wget -qO- -T 10 "$1"; fi
}

# expect TEXT COMMAND... shows the command's output and demands the text in it.
expect() {
	local text=$1 out
	shift
	out=$("$@")
	printf '%s\n' "$out"
	grep -qF -- "$text" <<<"$out" || { echo "that does not contain: $text"; return 1; }
}

keep() { cat >"$work/$1"; }
kept() { cat "$work/$1"; }

images_step() {
	images demo | keep layout
	"$bin/testimages" list "$(kept layout)"
}

registry_step() {
	registry_up
	# From inside the namespace: the registry listens on its loopback only.
	in_ns "$bin/testimages" push --to "$registry" "$(kept layout)"
	echo "two images are at http://$registry"
}

naru_step() {
	runtime_up
	own_state | keep idle
	crictl version
}

pull_step() {
	local image
	for image in nginx busybox; do
		crictl pull "localhost/demo/$image:1"
	done
	crictl images
}

pod_step() {
	mkdir "$work/pods"
	keep pod.json <<-EOF
	{"metadata": {"name": "web", "namespace": "demo", "uid": "$run_name", "attempt": 1},
	 "hostname": "web", "log_directory": "$work/pods", "labels": {"app": "demo"},
	 "dns_config": {"servers": ["192.0.2.53"], "searches": ["demo.example"]},
	 "port_mappings": [{"protocol": 0, "container_port": 80, "host_port": 8080}],
	 "linux": {"cgroup_parent": "$(naru_cgroup_parent)"}}
	EOF
	crictl runp "$work/pod.json" | keep pod
	note_namespaces
	crictl pods
}

container_step() {
	keep nginx.json <<-EOF
	{"metadata": {"name": "nginx"}, "labels": {"io.kubernetes.pod.name": "web", "io.kubernetes.pod.namespace": "demo"}, "image": {"image": "localhost/demo/nginx:1"}, "log_path": "nginx.log",
	 "linux": {"resources": {"memory_limit_in_bytes": 67108864, "cpu_shares": 100}}}
	EOF
	keep sidecar.json <<-EOF
	{"metadata": {"name": "sidecar"}, "labels": {"io.kubernetes.pod.name": "web", "io.kubernetes.pod.namespace": "demo"}, "image": {"image": "localhost/demo/busybox:1"}, "log_path": "sidecar.log",
	 "command": ["sh", "-c", "while :; do wget -qO- http://127.0.0.1/ && sleep 1; sleep 0.1; done"],
	 "linux": {"security_context": {"run_as_user": {"value": 65534}, "no_new_privs": true}}}
	EOF
	local name
	for name in nginx sidecar; do
		crictl create "$(kept pod)" "$work/$name.json" "$work/pod.json" | keep "$name"
		crictl start "$(kept $name)" >/dev/null
	done
	crictl ps
	if [ "${PEER:-naru}" = naru ]; then naru_cli ps; fi
}

ip_step() {
	crictl inspectp --output go-template --template '{{.status.network.ip}}' "$(kept pod)" | keep ip
	echo "the pod's address is $(kept ip)"
	wait_for 10 fetch "http://$(kept ip)/" || true
	echo "http://$(kept ip)/ says:"
	expect "Hello from a pod" fetch "http://$(kept ip)/"
}

port_step() {
	local address
	for address in 127.0.0.1 "$node_ip"; do
		echo "http://$address:8080/ says:"
		expect "Hello from a pod" fetch "http://$address:8080/"
	done
}

exec_step() {
	echo "synchronous, in nginx:"
	expect "web" crictl exec --sync "$(kept nginx)" hostname
	echo "streamed, in the sidecar:"
	expect "uid=65534" crictl exec "$(kept sidecar)" id
}

logs_step() {
	wait_for 10 grep -q Hello "$work/pods/sidecar.log" || true
	echo "sidecar, which fetches http://127.0.0.1/ in the pod:"
	expect "Hello from a pod" crictl logs --tail 1 "$(kept sidecar)"
	echo "nginx:"
	expect "GET / HTTP" crictl logs --tail 1 "$(kept nginx)"
}

stats_step() {
	expect nginx crictl stats
	expect web crictl statsp
}

forward_step() {
	spawn forward "$bin/crictl" --config "$work/crictl.yaml" port-forward "$(kept pod)" 18080:80
	wait_for 10 fetch http://127.0.0.1:18080/ || true
	echo "http://127.0.0.1:18080/ says:"
	expect "Hello from a pod" fetch http://127.0.0.1:18080/
	halt forward
}

stop_step() {
	crictl stop --timeout 5 "$(kept nginx)" "$(kept sidecar)"
	crictl ps --all
}

remove_step() {
	crictl rm "$(kept nginx)" "$(kept sidecar)"
	crictl stopp "$(kept pod)"
	crictl rmp "$(kept pod)"
}

rmi_step() { crictl rmi localhost/demo/nginx:1 localhost/demo/busybox:1; }

# own_state is what there is of the demo's own: it must be after the last pod
# as it was before the first.
own_state() {
	in_ns ip -o link show | awk -F': ' '{print "link " $2}'
	in_ns nft list tables | sed 's/^/nft /'
	awk -v d="$work/" 'index($5, d) == 1 {print "mount " $5}' /proc/self/mountinfo
	cgroups_of "$run_name-pods*" | sed 's/^/cgroup /'
	crictl pods -q
	crictl ps -aq
}

inside_step() {
	local left
	left=$(comm -13 <(sort -u "$work/idle") <(own_state | sort -u))
	[ -z "$left" ] || { echo "left:"; echo "$left"; return 1; }
	echo "links, nft tables, mounts and cgroups are as before the first pod; no pod, no container"
}

down_step() {
	runtime_down
	halt registry
	place_empty
	umount "$netns"
	echo "naru and the registry are stopped, the network namespace is gone"
}

nothing_step() {
	local left
	left=$(leftovers "$work/before"
		ps -eo pid=,args= | grep -F "$work/" | grep -vE "^ *($$|$BASHPID) |grep -F" | sed 's/^ */process /' || true)
	[ -z "$left" ] || { echo "left on this machine:"; echo "$left"; return 1; }
	echo "mounts, network namespaces, links, cgroups and nft tables are as they were before"
	echo "no process is left"
}

begun=$EPOCHREALTIME
machine_state >"${TMPDIR:-/tmp}/naru-demo-before.$$"
work_begin demo
mv "${TMPDIR:-/tmp}/naru-demo-before.$$" "$work/before"
say "Everything below happens in $work and in a network namespace of its own."
step "make two images from Debian packages: nginx and busybox" images_step
step "start a registry on loopback and push them" registry_step
registry=$(cat "$work/registry")
step "start naru on a temporary root" naru_step
step "pull the images" pull_step
step "run a pod: host port 8080 leads to its port 80" pod_step
step "start its two containers: nginx and a sidecar" container_step
step "reach the pod on its own address" ip_step
step "reach it on the host port, by loopback and by the node's address" port_step
step "run commands in the containers" exec_step
step "read their logs" logs_step
step "see what they use" stats_step
step "forward a port to the pod" forward_step
step "stop the containers" stop_step
step "remove containers and pod" remove_step
step "remove the images" rmi_step
step "look for what is left beside the running naru" inside_step
step "stop naru" down_step
step "look for what is left on the machine" nothing_step
say "${bold}The demo took $(since "$begun") s.$plain"
