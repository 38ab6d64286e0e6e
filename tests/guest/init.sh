#!/bin/busybox sh
# The guest's first process: this machine's root, read-only, with a file system in memory over it; then /job, and off.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
for module in /modules/*; do
	$b insmod "$module" || echo "guest: cannot load $module"
done
options=trans=virtio,version=9p2000.L,msize=1048576
$b mount -t 9p -o $options,cache=loose,ro host /lower
$b mount -t tmpfs upper /upper
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work root /root
cd /root || $b poweroff -f
$b mount -t proc proc proc
$b mount -t sysfs sys sys
$b mount -t devtmpfs dev dev
$b mkdir -p dev/pts dev/shm out
$b mount -t devpts devpts dev/pts
$b mount -t tmpfs shm dev/shm
$b mount -t cgroup2 cgroup sys/fs/cgroup
$b mount -t bpf bpf sys/fs/bpf
$b mount -t 9p -o $options out out
$b ip link set lo up
$b cp /job out/job
echo "guest: up after $($b cut -d' ' -f1 /proc/uptime) s"
$b chroot . /bin/bash /out/job
echo $? >out/code.new
$b mv out/code.new out/code
echo "guest: done after $($b cut -d' ' -f1 /proc/uptime) s"
$b umount out
$b poweroff -f
