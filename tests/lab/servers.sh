#!/bin/busybox sh
# Started by /init of the server guest when its drivers are loaded: addresses, then the servers, each by itself.
# curling.eth0=ADDRESS/LENGTH,... and the same for eth1; IPv4 and IPv6 addresses.

busybox() { /bin/busybox "$@"; }
export PATH=/bin HOME=/root

# The addresses are nobody else's, and a test need not wait for the guest to find that out.
echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
# Two cards in one network: each answers for its own addresses only.
echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
echo 2 >/proc/sys/net/ipv4/conf/all/arp_announce

[ -s /www/data ] || busybox echo "the archive was not unpacked whole: too little memory"
busybox ip link set lo up
for word in $(busybox cat /proc/cmdline); do
    case $word in
    curling.eth[01]=*)
        card=${word%%=*}
        card=${card#curling.}
        echo 0 >"/proc/sys/net/ipv6/conf/$card/accept_dad"
        busybox ip link set "$card" up
        IFS=,
        for address in ${word#*=}; do
            busybox ip address add "$address" dev "$card"
        done
        unset IFS
        ;;
    esac
done

busybox cat >/www/cgi-bin/sum <<'SUM'
#!/bin/busybox sh
printf 'Content-Type: text/plain\r\n\r\n'
/bin/busybox head -c "$CONTENT_LENGTH" | /bin/busybox sha256sum
SUM
busybox chmod 755 /www/cgi-bin/sum

dropbear -E -s -r /etc/dropbear/key -P /tmp/dropbear.pid
busybox httpd -h /www -p 80
redis-server --bind '*' '-::*' --protected-mode no --save '' --daemonize yes --dir /tmp --logfile /tmp/redis
