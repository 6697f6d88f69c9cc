#!/bin/bash
# The real kubelet, without an API server, drives naru: one static pod with an
# HTTP and an exec probe, a container that ends and is started again, logs and
# exec through the kubelet's own port. Kubelet and naru run in a network
# namespace of their own, on temporary folders; the host-wide kernel settings
# that a kubelet writes are masked for it.
#   hack/kubelet-smoke.sh
# Variables: PEER=containerd  drive Debian's containerd instead
#            KEEP_FAILED=1  keep the logs of a run that failed
. "$(dirname "$0")/lib.sh"
. "$top/hack/naru.sh"
. "$top/hack/containerd.sh"
. "$top/hack/kubelet.sh"

need_root
need ip nsenter unshare awk curl openssl

kubelet_config() {
	cat >"$work/kubelet.yaml" <<-EOF
	apiVersion: kubelet.config.k8s.io/v1beta1
	kind: KubeletConfiguration
	staticPodPath: $work/manifests
	containerRuntimeEndpoint: $endpoint
	podLogsDir: $work/podlogs
	cgroupRoot: /$run_name-pods
	featureGates: {PodAndContainerStatsFromCRI: $([ "${PEER:-naru}" = naru ] && echo true || echo false)}
	failCgroupV1: false
	enforceNodeAllocatable: []
	fileCheckFrequency: 1s
	syncFrequency: 5s
	registerNode: false
	readOnlyPort: 10255
	address: 127.0.0.1
	healthzBindAddress: 127.0.0.1
	volumePluginDir: $work/volumeplugins
	evictionHard: {memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%", imagefs.inodesFree: "0%"}
	imageGCHighThresholdPercent: 100
	authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
	authorization: {mode: AlwaysAllow}
	EOF
}

manifest() {
	cat >"$work/manifests/smoke.yaml" <<-EOF
	apiVersion: v1
	kind: Pod
	metadata: {name: smoke, namespace: default, labels: {app: smoke}}
	spec:
	  terminationGracePeriodSeconds: 2
	  containers:
	  - name: web
	    image: localhost/demo/nginx:1
	    ports: [{containerPort: 80, hostPort: 8080}]
	    resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 64Mi}}
	    livenessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1, failureThreshold: 10}
	    readinessProbe: {exec: {command: [test, -e, /tmp/ready]}, periodSeconds: 1, failureThreshold: 1}
	  - name: twice
	    image: localhost/demo/busybox:1
	    command: [sh, -c, 'if [ -e /data/once ]; then echo second run; exec sleep 3600; fi; echo first run; touch /data/once; exit 3']
	    volumeMounts: [{name: data, mountPath: /data}, {name: info, mountPath: /info}]
	  volumes:
	  - {name: data, emptyDir: {}}
	  - {name: info, downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}
	EOF
}

# container NAME prints the id of the newest container of that name.
container() { crictl ps -a --name "^$1\$" -q | head -1; }

pods() { in_ns curl -sS --max-time 5 http://127.0.0.1:10255/pods; }
ready() { pods | tr '{' '\n' | grep '"type":"Ready"' | grep -q "\"status\":\"$1\""; }
restarted() { pods | grep -q '"restartCount":1'; }
# metric NAME PART... finds a sample of that name with all parts among its labels.
metric() {
	local part samples
	samples=$(kubelet_get /metrics/cadvisor | grep "^$1{") || return
	for part in "${@:2}"; do samples=$(grep -F -- "$part" <<<"$samples") || return; done
}
kubelet_get() { in_ns curl -sSk --max-time 10 "https://127.0.0.1:10250$1"; }

ok() { printf '%sok%s %6.2f s  %s\n' "$green" "$plain" "$(since "$begun")" "$*"; }
try() {
	local what=$1
	shift
	"$@" || { tail -15 "$work/log/kubelet" >&2; crictl ps -a >&2 || true; pods >&2 || true; die "$what"; }
	ok "$what"
}
quietly() { "$@" >/dev/null; }
has() { grep -qF -- "$1" <<<"$("${@:2}")"; }

before_end() {
	rm -f "$work/manifests/smoke.yaml"
	halt kubelet
	[ ! -e "$work/crictl.yaml" ] || timeout 60 nsenter --net="$netns" "$bin/crictl" --config "$work/crictl.yaml" rmp -fa >/dev/null 2>&1
	for c in $(cgroups_of "$run_name-pods*"); do kill_cgroup "$c"; done
}

begun=$EPOCHREALTIME
layout=$(images demo)
machine_state >"${TMPDIR:-/tmp}/naru-kubelet-before.$$"
work_begin kubelet
mv "${TMPDIR:-/tmp}/naru-kubelet-before.$$" "$work/before"
kubelet_place
registry_up "$layout"
runtime_up
make_cgroup "$run_name-pods"
kubelet_config
ok "naru serves CRI"

spawn kubelet unshare --mount --propagation unchanged sh "$work/kubelet.sh" \
	"$(readlink -f "$bin/kubelet")" --config "$work/kubelet.yaml" --root-dir "$work/kubelet" \
	--cert-dir "$work/kubelet/pki" --hostname-override naru-smoke --node-ip "$node_ip" --v=2
try "the kubelet is healthy" wait_for 60 has ok in_ns curl -sS http://127.0.0.1:10248/healthz
manifest
try "the container that ends was started again (restart count 1)" wait_for 60 restarted
try "the pod is not ready while its exec probe fails" wait_for 30 ready False
quietly crictl exec --sync "$(container web)" touch /tmp/ready
try "the pod is ready once its exec probe succeeds" wait_for 30 ready True
note_namespaces
quietly crictl exec --sync "$(container web)" rm /tmp/ready
try "and not ready again when it fails" wait_for 30 ready False
quietly crictl exec --sync "$(container web)" touch /tmp/ready
try "and ready again" wait_for 30 ready True
try "the HTTP probe reaches nginx (its access log shows kube-probe)" wait_for 20 has kube-probe crictl logs "$(container web)"
try "the first run's exit code is 3" has '"exitCode":3' pods
try "the host port answers" has "Hello from a pod" in_ns curl -sS --max-time 5 "http://$node_ip:8080/"
logs=/containerLogs/default/smoke-naru-smoke/twice
try "the kubelet serves the second run's log" has "second run" kubelet_get "$logs"
try "and the first run's" has "first run" kubelet_get "$logs?previous=true"
try "the kubelet runs a command in the container" has smoke in_ns curl -sSk --max-time 10 -X POST "https://127.0.0.1:10250/run/default/smoke-naru-smoke/twice?cmd=cat%20/info/name"
try "the kubelet's statistics know the pod's containers" wait_for 30 has '"name": "twice"' kubelet_get /stats/summary
if [ "${PEER:-naru}" = naru ]; then
	labels='namespace="default",pod="smoke-naru-smoke"'
	try "its metrics have the container's memory, with labels" wait_for 30 metric container_memory_working_set_bytes 'container="web"' 'image="localhost/demo/nginx:1"' "$labels"
	try "and the pod's network" metric container_network_receive_bytes_total 'container="POD"' 'interface="eth0"' "$labels"
	try "and the container's sockets" metric container_sockets 'container="web"' "$labels"
fi
try "nothing but the restart happened (no other restart of nginx)" has '"restartCount":0' pods
rm "$work/manifests/smoke.yaml"
gone() { [ -z "$(crictl ps -q)" ]; }
try "the pod goes when its manifest goes" wait_for 60 gone
halt kubelet
crictl rmp -fa >/dev/null
runtime_down
halt registry
for c in $(cgroups_of "$run_name-pods*"); do kill_cgroup "$c"; done
place_empty
unmount_below "$work"
left=$(leftovers "$work/before")
[ -z "$left" ] || { warn "left on this machine:"; say "$left"; exit 1; }
ok "nothing is left on the machine"
say "PASS: kubelet-smoke in $(since "$begun") s"
