#!/bin/bash
# mkvm.sh - build (once) a clean Debian root image + kernel + tiny initrd for runvm.sh
#
#   SUITE=bookworm|trixie   KSUITE=<suite to take the kernel from, default: SUITE-security>
#   EXTRA="pkg pkg"         extra packages on top of the base list
#   VM_CACHE=DIR            where images are kept (image.sh: the project.s cache);  NAME=<symlink name, default $SUITE>
#   KFLAVOUR=cloud-amd64    or amd64 (9p, all drivers)
#
# Prints the image directory: root.img (ext4, raw, sparse), vmlinuz, initrd, manifest.txt
# Nothing on the host is changed: the build tree is a tmpfs in a private mount namespace.
set -euo pipefail
SUITE=${SUITE:-bookworm}
KSUITE=${KSUITE:-$SUITE}
KFLAVOUR=${KFLAVOUR:-cloud-amd64}
NAME=${NAME:-$SUITE}
EXTRA=${EXTRA:-}
ROOT_SIZE=${ROOT_SIZE:-12G}
# the archives that this machine's own apt uses
apt_uri() { cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -v '^ *#' | grep -oE '[a-z]+://[^ ]+' | sed 's#/$##' | grep -E "$1" | sed q || true; }
MIRROR=${MIRROR:-$(apt_uri '/debian$')}
SECURITY=${SECURITY:-$(apt_uri '/debian-security$')}
VM_CACHE=${VM_CACHE:?the folder for images; image.sh sets it}
PKGS="systemd systemd-sysv udev dbus kmod iproute2 nftables iptables ca-certificates busybox-static procps sudo $EXTRA"

key=$( { cat "$0"; echo "$SUITE $KSUITE $KFLAVOUR $PKGS $ROOT_SIZE"; } | sha256sum | cut -c1-16)
dest=$VM_CACHE/$key
mkdir -p "$VM_CACHE/debs-$SUITE"
exec 9>"$VM_CACHE/lock-$key"; flock 9
if [ -e "$dest/ok" ] && [ -z "${FORCE:-}" ]; then
  ln -sfn "$key" "$VM_CACHE/$NAME"; echo "$dest"; exit 0
fi
log() { printf 'mkvm %6.1fs %s\n' "$(bc -l <<<"$EPOCHREALTIME-$T0")" "$*" >&2; }
T0=$EPOCHREALTIME
rm -rf "$dest" "$dest.tmp"; mkdir -p "$dest.tmp"
export SUITE KSUITE KFLAVOUR PKGS ROOT_SIZE MIRROR SECURITY VM_CACHE T0 key out=$dest.tmp DEBIAN_FRONTEND=noninteractive LC_ALL=C
export -f log

# own mount namespace: no mounts leak to the host (a pid namespace makes apt fail: "Handler silently failed")
unshare --mount --propagation private bash -euo pipefail <<'INNER' 9>&- >&2
r=/mnt; mount -t tmpfs -o size=6G,mode=755 tmpfs $r
stage=$VM_CACHE/stage-$SUITE-$(sha256sum <<<"$PKGS $MIRROR" | cut -c1-12).tar
if [ -e "$stage" ]; then log "unpack $stage"; tar -x --numeric-owner -C $r -f "$stage"; else
log "debootstrap $SUITE"
debootstrap --variant=minbase --cache-dir="$VM_CACHE/debs-$SUITE" \
  --include="$(tr -s ' ' , <<<"$PKGS" | sed 's/,$//')" "$SUITE" $r "$MIRROR" >"$out/debootstrap.log" 2>&1 \
  || { tail -20 "$out/debootstrap.log"; exit 1; }
umount -l $r/proc $r/sys 2>/dev/null || true
tar -c --numeric-owner --one-file-system -C $r -f "$stage.tmp" . ; mv "$stage.tmp" "$stage"
fi
log "kernel from $KSUITE"
# own apt state under the target, so that the host's sources do not matter
{ echo "deb $MIRROR $SUITE main"; echo "deb $MIRROR $SUITE-updates main"; echo "deb $SECURITY $SUITE-security main"
  [ "$KSUITE" = "$SUITE" ] || echo "deb $MIRROR $KSUITE main"; } >$r/etc/apt/sources.list
cp /etc/resolv.conf $r/etc/resolv.conf
mount -t proc proc $r/proc; mount --rbind /dev $r/dev
apt="chroot $r apt-get -qq -o APT::Sandbox::User=root -o Acquire::Languages=none"
$apt update
# Follow the meta package's dependencies by hand (linux-image-X, linux-modules-X, ...): `apt install`
# would pull initramfs-tools and spend half a minute in its postinst.
ver=$(chroot $r apt-cache madison linux-image-$KFLAVOUR | awk -F'|' -v s=" $KSUITE" '{gsub(/ /,"",$2); if (index($3,s) && (v=="")) v=$2} END{print v}')
want="linux-image-$KFLAVOUR=$ver"; debs=
deps=$(chroot $r apt-cache show "$want" | sed -n 's/^Depends: //p' | tr ',' '\n' | sed -nE 's/^ *(linux-(image|modules|binary)-[^ ]+) \(= ([^)]+)\).*/\1=\3/p' | sort -u)
[ -n "$deps" ] || { log "no kernel $want"; exit 1; }
for d in $deps; do
  debs="$debs $d"
  debs="$debs $(chroot $r apt-cache show "$d" | sed -nE 's/^(Pre-)?Depends: //p' | tr ',' '\n' | sed -nE 's/^ *(linux-(modules|binary|base)-[^ ]+) \(= ([^)]+)\).*/\1=\3/p' | tr '\n' ' ')"
done
mkdir $r/kdeb
(cd $r/kdeb && chroot $r sh -c "cd /kdeb && apt-get -qq -o APT::Sandbox::User=root download $(tr ' ' '\n' <<<"$debs" | sort -u | tr '\n' ' ')")
for f in $r/kdeb/*.deb; do dpkg-deb --fsys-tarfile "$f" | tar -x -C $r --keep-directory-symlink --exclude='./usr/share/*'; done
mkdir -p "$out/k"; kv=$(ls $r/lib/modules | head -1)
m=$r/lib/modules/$kv   # kernels of 2026 keep vmlinuz and config there, older ones in /boot
cp "$(ls $r/boot/vmlinuz-* $m/vmlinuz 2>/dev/null | head -1)" "$out/vmlinuz"; cp "$(ls $r/boot/config-* $m/config 2>/dev/null | head -1)" "$out/config"
rm -f $m/vmlinuz $m/System.map; rm -rf $r/boot/* $r/kdeb
chroot $r depmod "$kv"

log "initrd ($kv)"
i=/mnt/.initrd; mkdir -p $i/{bin,dev,proc,sys,new,m}
cp $r/bin/busybox $i/bin/busybox
n=0
for m in virtio_pci virtio_mmio virtio_blk ext4; do
  chroot $r modprobe -S "$kv" --show-depends $m 2>/dev/null
done | awk '$1=="insmod" && !s[$2]++{print $2}' | while read -r f; do
  n=$((n+1)); b=$(printf '%02d-' $n)$(basename "$f"); cp "$r/$f" "$i/m/$b"
  case $b in *.xz) xz -d "$i/m/$b";; *.zst) zstd -q --rm -d "$i/m/$b";; esac
done
cat >$i/init <<'E'
#!/bin/busybox sh
B=/bin/busybox
$B mount -t devtmpfs d /dev; $B mount -t proc p /proc; $B mount -t sysfs s /sys
for f in /m/*; do $B insmod $f; done
n=0
while ! root=$($B findfs LABEL=vmroot 2>/dev/null) && [ $n -lt 200 ]; do n=$((n+1)); $B usleep 20000; done
$B mount -t ext4 -o rw,noatime $root /new || { echo "vm: no root disk"; $B poweroff -f; }
$B umount /proc; $B umount /sys; $B mount --move /dev /new/dev
exec $B switch_root /new /sbin/init
E
chmod +x $i/init
(cd $i && find . | sort | cpio --quiet -o -H newc -R 0:0 | gzip -1) >"$out/initrd"
rm -rf $i

log "configure"
cat >$r/usr/local/sbin/vmrun <<'E'
#!/bin/bash
# Runs the host's command (from fw_cfg), streams output and status over virtio-serial ports.
P=/dev/virtio-ports
modprobe -aq qemu_fw_cfg virtio_console virtio_net virtio_rng virtiofs
for _ in $(seq 200); do [ -e $P/vm.ctl ] && [ -e $P/vm.out ] && break; sleep 0.02; done
exec 8>$P/vm.ctl
echo "begin $(cut -d' ' -f1 /proc/uptime)" >&8
F=/sys/firmware/qemu_fw_cfg/by_name/opt/vm
cp $F/cmd/raw /run/vm.cmd; . /dev/stdin < <(tr -d '\0' <$F/env/raw)
mkdir -p /vm/out
for s in /sys/block/vd*/serial; do
  n=$(cat $s); d=${s#/sys/block/}; d=${d%/serial}
  case $n in share-*) mkdir -p /vm/${n#share-}; mount -o ro,noatime /dev/$d /vm/${n#share-};; esac
done
for t in $VM_VIRTIOFS; do mkdir -p /vm/$t; mount -t virtiofs -o ro share-$t /vm/$t; done
cd /vm; export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb LC_ALL=C.UTF-8
echo "start $(cut -d' ' -f1 /proc/uptime)" >&8
bash /run/vm.cmd </dev/null >$P/vm.out 2>&1; rc=$?
echo "rc $rc $(cut -d' ' -f1 /proc/uptime)" >&8
if [ -e $P/vm.tar ]; then tar -C /vm/out -cf $P/vm.tar . 2>/dev/null; fi
echo "off $(cut -d' ' -f1 /proc/uptime)" >&8
if [ -n "$VM_CLEAN_SHUTDOWN" ]; then systemctl poweroff; else echo o >/proc/sysrq-trigger; fi
E
chmod 755 $r/usr/local/sbin/vmrun
cat >$r/etc/systemd/system/vmrun.service <<'E'
[Unit]
Description=command from the host
After=multi-user.target
[Service]
Type=exec
ExecStart=/usr/local/sbin/vmrun
Delegate=yes
KillMode=process
TasksMax=infinity
LimitNOFILE=1048576
LimitCORE=infinity
OOMScoreAdjust=-900
StandardOutput=journal+console
StandardError=journal+console
E
cat >$r/etc/systemd/system/vmrun.target <<'E'
[Unit]
Description=vm run
Requires=multi-user.target
Wants=vmrun.service
After=multi-user.target
AllowIsolate=yes
E
for u in getty@tty1.service serial-getty@ttyS0.service getty.target apt-daily.timer apt-daily-upgrade.timer \
  dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-timesyncd.service \
  systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-pstore.service systemd-hwdb-update.service \
  systemd-journal-flush.service systemd-journal-catalog-update.service ldconfig.service; do
  ln -sfn /dev/null $r/etc/systemd/system/$u
done
# Boot work costs ~10x under TCG: skip what a container host's tests do not need.
for u in modprobe@drm modprobe@dm_mod modprobe@loop modprobe@configfs systemd-repart systemd-firstboot systemd-sysext \
  systemd-modules-load systemd-random-seed systemd-rfkill systemd-ask-password-wall systemd-ask-password-console \
  e2scrub_all apt-daily systemd-tpm2-setup systemd-tpm2-setup-early systemd-pcrphase systemd-hibernate-clear; do
  ln -sfn /dev/null $r/etc/systemd/system/$u.service; done
for u in sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount systemd-initctl.socket \
  systemd-journald-audit.socket systemd-ask-password-wall.path systemd-ask-password-console.path; do
  ln -sfn /dev/null $r/etc/systemd/system/$u; done
mkdir -p $r/etc/systemd/system-generators
for g in $r/lib/systemd/system-generators/*; do case ${g##*/} in systemd-fstab-generator|systemd-debug-generator) ;;
  *) ln -sfn /dev/null $r/etc/systemd/system-generators/${g##*/};; esac; done
rm -f $r/lib/systemd/system/multi-user.target.wants/systemd-logind.service   # still started on demand over D-Bus
mkdir -p $r/etc/systemd/system/systemd-udev-trigger.service.d
printf '[Service]\nExecStart=\nExecStart=/bin/udevadm trigger --action=add -s block -s net -s virtio-ports -s misc -s mem\n' \
  >$r/etc/systemd/system/systemd-udev-trigger.service.d/vm.conf
mkdir -p $r/etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=64M\nForwardToConsole=no\nRateLimitIntervalSec=0\n' >$r/etc/systemd/journald.conf.d/vm.conf
echo vm >$r/etc/hostname; printf '127.0.0.1 localhost vm\n::1 localhost\n' >$r/etc/hosts; : >$r/etc/resolv.conf
echo 'LABEL=vmroot / ext4 noatime 0 0' >$r/etc/fstab
printf '%s%s\n' "$key" "$key" | cut -c1-32 >$r/etc/machine-id
chroot $r dpkg-query -W >"$out/manifest.txt"; echo "kernel $kv ($debs)" >>"$out/manifest.txt"
rm -rf $r/var/cache/apt/archives/*.deb $r/var/lib/apt/lists/* $r/usr/share/{doc,man,info,locale}/* $r/var/log/*.log $r/var/cache/apt/*.bin
touch $r/etc/.updated $r/var/.updated
log "mke2fs ($(du -sm --exclude=proc --exclude=sys $r | cut -f1) MB)"
umount -l $r/proc $r/dev; umount -l $r/sys 2>/dev/null || true
truncate -s "$ROOT_SIZE" "$out/root.img"
# keep the journal: without one ext4 skips recently deleted inodes in a linear scan (5000 files: 6 s, then 39 s)
mke2fs -q -t ext4 -L vmroot -J size=64 -O ^metadata_csum -E lazy_itable_init=1,nodiscard -i 16384 -m 0 -d $r "$out/root.img"
INNER
touch "$dest.tmp/ok"; rm -rf "$dest.tmp/k"; mv "$dest.tmp" "$dest"; ln -sfn "$key" "$VM_CACHE/$NAME"
log "done: $(du -sm "$dest" | cut -f1) MB on disk"
echo "$dest"
