#!/bin/bash
# runvm.sh - run a command as root in a fresh Debian VM (QEMU TCG), stream its output, return its status
#
#   runvm.sh [-i image] [-s DIR[:NAME]]... [-o OUTDIR] [-t SECS] [-m MB] [-c CPUS] [-n] [-v] -- CMD...
#   -s  share DIR read-only at /vm/NAME (default NAME: share)      -o  /vm/out of the guest is unpacked here
#   -f  script file to run instead of CMD                          -n  user-mode network (restrict=on unless VM_NET=open)
#   -v  print kernel console at the end                             VM_SHARE=disk|virtiofs   VM_MACHINE=pc|q35|microvm
# Exit status: that of CMD; 124 timeout; 125 the VM died or never ran CMD (console on stderr).
set -euo pipefail
VM_CACHE=${VM_CACHE:?the folder for images; test.sh sets it}
img=bookworm mem=4096 cpus=2 tmo=600 outdir= net= verbose= file= shares=()
while getopts i:s:o:t:m:c:f:nv o; do case $o in
  i) img=$OPTARG;; s) shares+=("$OPTARG");; o) outdir=$OPTARG;; t) tmo=$OPTARG;; m) mem=$OPTARG;;
  c) cpus=$OPTARG;; f) file=$OPTARG;; n) net=1;; v) verbose=1;; *) exit 2;; esac; done
shift $((OPTIND-1))
I=$VM_CACHE/$img; [ -e "$I/ok" ] || { echo "runvm: no image $I: run make vm-image" >&2; exit 2; }
QEMU=${VM_QEMU:-qemu-system-x86_64}
MACHINE=${VM_MACHINE:-pc}
ACCEL=${VM_ACCEL:-tcg,thread=multi,tb-size=1024}
CPU=${VM_CPU:-max,la57=off}
W=$(mktemp -d "${VM_TMP:-/var/tmp}/runvm.XXXXXX"); pids=()
cleanup() { for p in "${pids[@]}"; do kill "$p" 2>/dev/null || :; done; rm -rf "$W"; }
trap cleanup EXIT; trap 'exit 130' INT TERM
T0=$EPOCHREALTIME

if [ -n "$file" ]; then cp "$file" "$W/cmd"; else printf '%s\n' "$*" >"$W/cmd"; fi
case $MACHINE in microvm*) sfx=device;; *) sfx=pci;; esac
d() { args+=(-device "$1-$sfx$2"); }      # a virtio device on the machine's bus
args=(-nodefaults -no-user-config -no-reboot -display none -m "$mem" -smp "$cpus" -accel "$ACCEL" -cpu "$CPU"
  -kernel "$I/vmlinuz" -initrd "$I/initrd"
  -append "rw console=ttyS0 panic=-1 ${VM_LOG:-quiet loglevel=4} mitigations=off nokaslr tsc=reliable audit=0 ${VM_ASLR:-norandmaps} systemd.unit=vmrun.target systemd.show_status=0 ${VM_APPEND:-}"
  -serial "file:$W/console" -rtc base=utc
  -drive "if=none,id=root,file=$I/root.img,format=raw,snapshot=on,cache=unsafe,aio=threads,discard=unmap"
  -fw_cfg "name=opt/vm/cmd,file=$W/cmd" -fw_cfg "name=opt/vm/env,file=$W/env"
  -chardev "file,id=out,path=$W/out" -chardev "file,id=ctl,path=$W/ctl"
)
vfs=
case $MACHINE in
  microvm*) args+=(-machine "$MACHINE,acpi=on,rtc=on,isa-serial=on,pit=on,pic=on,pcie=off,auto-kernel-cmdline=off");;
  *) args+=(-machine "$MACHINE,usb=off,vmport=off,i8042=off,dump-guest-core=off,mem-merge=off${VM_MOPTS:-}");;
esac
d virtio-blk ,drive=root,serial=root; d virtio-rng ''
d virtio-serial ",max_ports=8"
args+=(-device virtserialport,chardev=out,name=vm.out -device virtserialport,chardev=ctl,name=vm.ctl)
if [ -n "$outdir" ]; then mkdir -p "$outdir"
  args+=(-chardev "file,id=tar,path=$W/out.tar" -device virtserialport,chardev=tar,name=vm.tar); fi
n=0
for s in "${shares[@]}"; do
  dir=$(readlink -f "${s%%:*}"); name=${s#*:}; [ "$name" != "$s" ] || name=share; n=$((n+1))
  if [ "${VM_SHARE:-disk}" = virtiofs ]; then
    /usr/lib/qemu/virtiofsd --socket-path="$W/fs$n" -o source="$dir",cache=always,no_xattr 2>"${VM_FSLOG:-$W/fs$n.log}" & pids+=($!)
    for _ in $(seq 100); do [ -S "$W/fs$n" ] && break; sleep 0.02; done
    args+=(-chardev "socket,id=fs$n,path=$W/fs$n"); d vhost-user-fs ",chardev=fs$n,tag=share-$name"; vfs="$vfs $name"
  else
    mb=$(du -sLm --apparent-size "$dir" 2>/dev/null | cut -f1); truncate -s $((mb*105/100+16))M "$W/share$n.img"
    mke2fs -q -t ext4 -O ^has_journal,^metadata_csum,^resize_inode -E nodiscard,root_owner=0:0 -m 0 -d "$dir" "$W/share$n.img"
    args+=(-drive "if=none,id=sh$n,file=$W/share$n.img,format=raw,readonly=on,cache=unsafe"); d virtio-blk ",drive=sh$n,serial=share-$name"
  fi
done
[ -z "$vfs" ] || args+=(-object "memory-backend-memfd,id=mem,size=${mem}M,share=on" -numa node,memdev=mem)
if [ -n "$net" ]; then args+=(-netdev "user,id=n0$([ "${VM_NET:-}" = open ] || echo ,restrict=on)"); d virtio-net ,netdev=n0; else args+=(-nic none); fi
printf 'VM_VIRTIOFS="%s"; VM_CLEAN_SHUTDOWN=%s; export VM_CPUS=%s\n' "$vfs" "${VM_CLEAN_SHUTDOWN:-}" "$cpus" >"$W/env"
mkfifo "$W/ctl" "$W/out"   # fifos: a stdio chardev whose stdin is at EOF counts as unplugged and blocks the guest
cat "$W/out" & outpid=$!
( while read -r l; do echo "$EPOCHREALTIME $l"; done <"$W/ctl" >"$W/ctl.log" ) & ctlpid=$!; pids+=($ctlpid)
T1=$EPOCHREALTIME
q=0; TIMEFORMAT='%U %S'; { time timeout -k 5 "$tmo" "$QEMU" "${args[@]}" </dev/null 2>"$W/qerr"; } 2>"$W/cpu" || q=$?
cat "$W/qerr" >&2
T2=$EPOCHREALTIME
[ -e "$W/console" ] && wait "$outpid" || kill "$outpid" || :
kill "$ctlpid" 2>/dev/null || :; wait "$ctlpid" 2>/dev/null || :
f() { awk -v k="$1" '$2==k{print $1; exit}' "$W/ctl.log"; }
rc=$(awk '$2=="rc"{print $3; exit}' "$W/ctl.log" | tr -d '\r'); b=$(f start); e=$(f rc)
dt() { awk -v a="${1:-0}" -v b="${2:-0}" 'BEGIN{printf "%.2f", (a && b) ? b-a : -1}'; }
[ -z "${VM_QUIET:-}" ] && echo "runvm: prepare $(dt $T0 $T1)s boot-to-command $(dt $T1 $b)s command $(dt $b $e)s shutdown $(dt $e $T2)s total $(dt $T0 $T2)s cpu $(tr " " + <"$W/cpu")s qemu=$q rc=${rc:-none}" >&2
[ -z "$verbose" ] || sed 's/^/console: /' "$W/console" >&2
[ -z "$outdir" ] || tar -x -C "$outdir" -f "$W/out.tar" 2>/dev/null || :
[ "$q" != 124 ] || { tail -20 "$W/console" >&2; exit 124; }
if [ -z "$rc" ]; then echo "runvm: the command did not finish; console:" >&2; tail -40 "$W/console" >&2; exit 125; fi
exit "$rc"
