#!/bin/busybox sh
# /init of the lab's Linux guest: the drivers for what the machine has, the network if asked, then the program.
# Drivers are grouped in /modules/GROUP, in the order of loading (see initramfs.py).

busybox() { /bin/busybox "$@"; }
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs devtmpfs /dev

load() { for module in $(busybox cat "/modules/$1"); do busybox insmod "/modules/$module"; done; }
has() { busybox grep -qs "$1" /sys/bus/*/devices/*/modalias; }

has 'pci:v00001AF4' && load virtio
has 'pci:v00001B36d00000011' && load pvpanic-pci
has 'acpi:QEMU0001' && load pvpanic-mmio

# curling.ip=ADDRESS/LENGTH
for word in $(busybox cat /proc/cmdline); do
    case $word in
    curling.ip=*)
        busybox ip link set eth0 up
        busybox ip address add "${word#*=}" dev eth0
        ;;
    esac
done

# The server guest's.
[ -x /servers ] && /servers

exec /guest
