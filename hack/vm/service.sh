#!/bin/bash
# Inside the test machine: installs naru as a user would, lets systemd run it,
# and checks readiness, watchdog, restart and crash with a running container,
# with the systemd cgroup driver.
set -euo pipefail
tree=/vm/naru
export LC_ALL=C PATH=$PATH:/usr/local/bin
say() { echo "$(cut -d' ' -f1 /proc/uptime)s $*"; }
die() { say "FAIL: $*"; journalctl -u naru -u naru-monitor --no-pager -o cat | tail -40; exit 1; }

install -m 0755 "$tree/bin/naru" "$tree/bin/naru-monitor" "$tree/bin/crictl" /usr/local/bin/
mkdir -p /usr/local/lib/systemd/system /etc/naru/config.d /etc/naru/certs.d
for u in naru.service naru-monitor.service; do
	sed 's|@PREFIX@|/usr/local|g; s|@SYSCONFDIR@|/etc|g' "$tree/packaging/$u" >/usr/local/lib/systemd/system/$u
done
install -D -m 0644 "$tree/packaging/apparmor/naru-default" /etc/apparmor.d/naru-default
naru config default >/etc/naru/config.toml
naru config check --config /etc/naru/config.toml
cp "$tree/packaging/crictl.yaml" /etc/crictl.yaml
systemd-analyze verify /usr/local/lib/systemd/system/naru.service /usr/local/lib/systemd/system/naru-monitor.service || die "systemd finds fault with the units"
systemctl daemon-reload
systemctl enable --now naru || die "the unit does not start"
[ "$(systemctl is-active naru)" = active ] || die "naru is not active"
say "started; systemd was told when it was ready"
grep -q '^naru-default (enforce)' /sys/kernel/security/apparmor/profiles || die "the AppArmor profile is not loaded"
naru doctor || true
# The default waits for a pod range; say one by a drop-in.
printf '[network]\npod_cidr = ["10.85.0.0/16"]\n' >/etc/naru/config.d/10-range.toml
naru config check
systemctl restart naru || die "does not start with a drop-in"
crictl info | tr -d ' \n' | grep -q '"type":"NetworkReady","status":true\|"status":true,"type":"NetworkReady"' || { crictl info; die "the network is not ready"; }

for image in nginx busybox; do
	"$tree/bin/testimages" archive "$tree/images/demo" "localhost/demo/$image:1" /var/tmp/$image.tar
	naru image load /var/tmp/$image.tar
done
mkdir -p /var/log/pods/demo
cat >/var/tmp/pod.json <<-EOF
{"metadata": {"name": "web", "namespace": "demo", "uid": "uid-1", "attempt": 1}, "log_directory": "/var/log/pods/demo",
 "linux": {"cgroup_parent": "kubepods-demo.slice"}}
EOF
cat >/var/tmp/counter.json <<-EOF
{"metadata": {"name": "counter"}, "image": {"image": "localhost/demo/busybox:1"}, "log_path": "counter.log",
 "command": ["sh", "-c", "i=0; while :; do echo \$i; i=\$((i+1)); sleep 0.05; done"],
 "linux": {"resources": {"memory_limit_in_bytes": 67108864}}}
EOF
pod=$(crictl runp /var/tmp/pod.json)
container=$(crictl create "$pod" /var/tmp/counter.json /var/tmp/pod.json)
crictl start "$container" >/dev/null
pid=$(crictl inspect --output go-template --template '{{.info.pid}}' "$container")
say "container runs as process $pid in $(cut -d: -f3 "/proc/$pid/cgroup")"
grep -q "kubepods-demo.slice/.*naru-.*scope" "/proc/$pid/cgroup" || die "not in a scope under the pod's slice"
[ "$(cat "/sys/fs/cgroup$(cut -d: -f3 "/proc/$pid/cgroup")/memory.max")" = 67108864 ] || die "the memory limit is not set"

[ "$(cat "/proc/$pid/attr/apparmor/current")" = "naru-default (enforce)" ] || die "not under the AppArmor profile: $(cat "/proc/$pid/attr/apparmor/current")"

running() { [ "$(crictl ps --id "$container" -q)" ] && kill -0 "$pid" 2>/dev/null; }
wait_running() { for _ in $(seq 200); do if running 2>/dev/null; then return 0; fi; sleep 0.2; done; return 1; }

systemctl restart naru || die "restart"
wait_running || die "the container did not survive a restart"
say "survived systemctl restart naru"
socket=$(stat -c %i /run/naru/naru.sock)
kill -KILL "$(systemctl show -p MainPID --value naru)"
crictl version >/dev/null || die "a call does not wait while the daemon is away"
systemctl restart naru && crictl version >/dev/null || die "a call right after a restart"
[ "$(stat -c %i /run/naru/naru.sock)" = "$socket" ] || die "the socket did not stay open over the daemon's death and a restart"
say "calls wait on the same socket while the daemon is away"
rm /run/naru/naru.sock
systemctl restart naru && crictl version >/dev/null || die "no socket after one was removed"
socket=$(stat -c %i /run/naru/naru.sock)
systemctl restart naru && crictl version >/dev/null || die "the daemon took the removed socket for the one in its place"
[ "$(stat -c %i /run/naru/naru.sock)" = "$socket" ] || die "the new socket did not stay open over a restart"
say "a removed socket is made anew, and stays open in its turn"
wait_running || die "the container did not survive SIGKILL of the daemon"
say "survived SIGKILL of the daemon; systemd started it again"
keeper=$(systemctl show -p MainPID --value naru-monitor)
worker() { ps -o pid=,args= --ppid "$keeper" | awk '/naru-monitor worker/ {print $1}'; }
old=$(worker)
kill -KILL "$old"
for _ in $(seq 100); do [ -n "$(worker)" ] && [ "$(worker)" != "$old" ] && break; sleep 0.1; done
[ -n "$(worker)" ] || die "the keeper started no other worker"
[ "$(crictl exec --sync "$container" echo there)" = there ] || die "no exec after SIGKILL of the worker"
wait_running || die "the container did not survive SIGKILL of the worker"
say "survived SIGKILL of the worker"
systemctl reload naru-monitor
sleep 1
[ "$(systemctl show -p MainPID --value naru-monitor)" = "$keeper" ] || die "the keeper's process changed with reload"
[ "$(crictl exec --sync "$container" echo there)" = there ] || die "no exec after the keeper replaced itself"
wait_running || die "the container did not survive the keeper's execve"
say "survived the keeper's execve in place (systemctl reload naru-monitor)"
# The daemon has given up what it does not need; the keeper has not, and while
# systemd starts the next one, a daemon that starts waits for that.
daemon=$(systemctl show -p MainPID --value naru)
[ "$(awk '/^Seccomp:/ {print $2}' "/proc/$daemon/status" "/proc/$keeper/status" | tr -d '\n')" = 20 ] || die "the daemon has no filter, or the keeper has one"
[ "$(awk '/^CapBnd:/ {print $2}' "/proc/$daemon/status")" != "$(awk '/^CapBnd:/ {print $2}' "/proc/$keeper/status")" ] || die "the daemon has all capabilities"
[ "$(cat "/proc/$daemon/oom_score_adj")" = -999 ] || die "oom_score_adj of the daemon is $(cat "/proc/$daemon/oom_score_adj")"
kill -KILL "$keeper"
systemctl restart naru || die "restart without a keeper"
wait_running || die "the container did not survive SIGKILL of the keeper"
next=$(systemctl show -p MainPID --value naru-monitor)
[ "$next" != "$keeper" ] && [ "$(systemctl is-active naru-monitor)" = active ] || die "systemd started no other keeper"
[ "$(pgrep -fc '^naru-monitor keeper')" = 1 ] || die "there are several keepers: $(pgrep -fa '^naru-monitor')"
[ "$(crictl exec --sync "$container" echo there)" = there ] || die "no exec after SIGKILL of the keeper"
say "survived SIGKILL of the keeper, with a restart of the daemon meanwhile"
systemctl daemon-reload
running || die "the container did not survive daemon-reload"

# Every number once and in order: nothing lost, nothing doubled.
crictl stop -t 1 "$container" >/dev/null
awk '{n = $4; if (n != NR - 1) {print "line " NR " is " n; exit 1}}' /var/log/pods/demo/counter.log || die "the log has a gap or a double"
say "log is whole: $(wc -l </var/log/pods/demo/counter.log) lines"
crictl rmp -fa >/dev/null
systemctl stop naru
[ -z "$(find /sys/fs/cgroup/kubepods.slice /sys/fs/cgroup/kubepods-demo.slice -name 'naru-*.scope' 2>/dev/null)" ] || die "a scope is left"
systemctl stop naru-monitor
systemctl disable naru 2>/dev/null
say "PASS: service"
