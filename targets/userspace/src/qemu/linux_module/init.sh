#!/bin/busybox sh
# The guest's first process: loads the module, waits until the application ends, and says how on the second serial port.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
stty -F /dev/ttyS0 raw -echo
stty -F /dev/ttyS1 raw

# The module's messages, without the kernel's own, unless a test has the kernel say everything itself. busybox's insmod
# tries twice, and one complaint is enough.
last=
[ -f /script ] || while IFS= read -r line; do
	text=${line#*\] }
	[ "$text" = "$last" ] && continue
	last=$text
	case $line in
	*"taints kernel"* | *"tainting kernel"*) ;;
	*"] anykernel: "*) echo "${text#anykernel: }" ;;
	esac
done </proc/kmsg >/dev/ttyS0 &

end() {
	sleep 0.3
	echo "$1" >/dev/ttyS1
	sync
	# A good end goes without saying.
	echo 0 >/proc/sys/kernel/printk
	poweroff -f
	sleep 60
}

fail() {
	echo "$1" >/dev/ttyS0
	end 1
}

for file in /lib/*.ko.xz; do
	[ -f "$file" ] && unxz "$file"
done
for file in /lib/*-*.ko; do
	[ -f "$file" ] && mv "$file" "/lib/$(basename "$file" | tr - _)"
done
for name in $(cat /modules); do
	if [ -f "/lib/$name.ko" ]; then
		insmod "/lib/$name.ko" || fail "the kernel does not take its own module $name"
	fi
done

tries=0
while [ "$(ls /sys/bus/usb/devices 2>/dev/null | grep -c '^[^:]*-[^:]*$')" -lt "$(cat /usb)" ] && [ $tries -lt 100 ]; do
	sleep 0.1
	tries=$((tries + 1))
done

# A test brings its own, which writes what it finds to the second serial port.
[ -f /script ] && . /script

links=0
if [ -e /sys/class/net/eth0 ]; then
	links=1
	brctl addbr br0 && echo 0 >/sys/class/net/br0/bridge/forward_delay && brctl addif br0 eth0 || fail "no bridge"
	ip link set eth0 up
	ip link set br0 up
fi
# What insmod says is said by the module, too, and better.
insmod /lib/anykernel.ko links=$links $(cat /parameters) 2>/dev/null || end 1
if [ $links = 1 ]; then
	brctl addif br0 ak0 || fail "ak0 cannot be bridged"
	ip link set ak0 up
fi

# The host asks for the end with Ctrl-C on the console.
(
	while byte=$(dd bs=1 count=1 2>/dev/null); do
		[ "$byte" = "$(printf '\003')" ] && break
	done
	: >/stop
) </dev/ttyS0 &

while :; do
	[ -e /stop ] && break
	read -r state code </sys/module/anykernel/parameters/status
	case $state in
	ended | dead) break ;;
	esac
	sleep 0.2
done
rmmod anykernel
end "${code:-0}"
