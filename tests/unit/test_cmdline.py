"""The standby's command line, from command lines as people, libvirt and Proxmox write them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.errors import CannotDerive
from curling_fd.standby.cmdline import (
    CommandLine,
    Option,
    RamBlock,
    device_ids,
    guest_memory,
    parse,
    standby_argv,
)
from curling_fd.standby.keyval import Keyval
from curling_fd.standby.options import FLAGS, WITH_WORD

MIB = 1 << 20
DIRECTORY = "/run/curling/vms/web"
QMP = f"{DIRECTORY}/qmp.sock"
OUR_END = [
    "-chardev", f"socket,id=curling-qmp,path={QMP},server=on,wait=off",
    "-mon", "chardev=curling-qmp,mode=control",
    "-incoming", "defer", "-S",
]  # fmt: skip
PC_RAM = RamBlock("pc.ram", 256 * MIB, 7)

LIBVIRT = [
    "/usr/bin/qemu-system-x86_64", "-name", "guest=web,debug-threads=on", "-S",
    "-object", '{"qom-type":"secret","id":"masterKey0","format":"raw",'
    '"file":"/var/lib/libvirt/qemu/domain-1-web/master-key.aes"}',
    "-machine", "pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,memory-backend=pc.ram",
    "-accel", "kvm", "-cpu", "host,migratable=on",
    "-m", "size=262144k,slots=16,maxmem=1048576k",
    "-object", '{"qom-type":"memory-backend-ram","id":"pc.ram","size":268435456,"prealloc":true,'
    '"host-nodes":[0],"policy":"bind"}',
    "-overcommit", "mem-lock=off", "-smp", "2,sockets=2,cores=1,threads=1",
    "-uuid", "c7a5fdbd-cdaf-9455-926a-d65c16db1809", "-display", "none", "-no-user-config", "-nodefaults",
    "-chardev", "socket,id=charmonitor,fd=31,server=on,wait=off",
    "-mon", "chardev=charmonitor,id=monitor,mode=control",
    "-rtc", "base=utc,driftfix=slew", "-no-shutdown", "-boot", "strict=on",
    "-device", '{"driver":"pcie-root-port","port":8,"chassis":1,"id":"pci.1","bus":"pcie.0","addr":"0x1"}',
    "-blockdev", '{"driver":"file","filename":"/var/lib/libvirt/images/web.qcow2",'
    '"node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}',
    "-blockdev", '{"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2",'
    '"file":"libvirt-1-storage"}',
    "-device", '{"driver":"virtio-blk-pci","bus":"pci.1","drive":"libvirt-1-format","id":"virtio-disk0"}',
    "-netdev", "tap,id=hostnet0,ifname=vnet0,script=no,downscript=no,vhost=on",
    "-add-fd", "set=0,fd=33,opaque=serial0-log",
    "-chardev", "pty,id=charserial0,logfile=/dev/fdset/0,logappend=on",
    "-device", '{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}',
    "-vnc", "127.0.0.1:0,audiodev=audio1", "-audiodev", '{"id":"audio1","driver":"none"}',
    "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    "-msg", "timestamp=on",
]  # fmt: skip

PROXMOX = [
    "/usr/bin/kvm", "-id", "100", "-name", "web,debug-threads=on", "-no-shutdown",
    "-chardev", "socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off",
    "-mon", "chardev=qmp,mode=control",
    "-chardev", "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5",
    "-mon", "chardev=qmp-event,mode=control",
    "-pidfile", "/var/run/qemu-server/100.pid", "-daemonize",
    "-smbios", "type=1,uuid=1b6e6a5c-5b0e-4a1d-bd9f-b4e3d9cbbd0a",
    "-smp", "4,sockets=1,cores=4,maxcpus=4", "-nodefaults",
    "-boot", "menu=on,strict=on,reboot-timeout=1000,splash=/usr/share/qemu-server/bootsplash.jpg",
    "-vnc", "unix:/var/run/qemu-server/100.vnc,password=on",
    "-cpu", "kvm64,enforce,+kvm_pv_eoi,+kvm_pv_unhalt,+lahf_lm,+sep", "-m", "256",
    "-object", "iothread,id=iothread-virtioscsi0",
    "-device", "pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e",
    "-chardev", "socket,path=/var/run/qemu-server/100.qga,server=on,wait=off,id=qga0",
    "-device", "virtio-serial,id=qga0,bus=pci.0,addr=0x8",
    "-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
    "-iscsi", "initiator-name=iqn.1993-08.org.debian:01:c2fb3a5d3d9",
    "-device", "virtio-scsi-pci,id=virtioscsi0,bus=pci.3,addr=0x1,iothread=iothread-virtioscsi0",
    "-drive", "file=/dev/pve/vm-100-disk-0,if=none,id=drive-scsi0,format=raw,cache=none,aio=io_uring",
    "-device", "scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,bootindex=100",
    "-netdev", "type=tap,id=net0,ifname=tap100i0,script=/usr/libexec/qemu-server/pve-bridge,vhost=on",
    "-device", "virtio-net-pci,mac=BC:24:11:0D:5E:0A,netdev=net0,bus=pci.0,addr=0x12,id=net0",
    "-machine", "type=pc+pve0",
]  # fmt: skip


def derive(
    argv: Sequence[str],
    *ram: RamBlock,
    machine: str | None = None,
    directory: str = DIRECTORY,
    replace: dict[str, str] | None = None,
    extra: Sequence[str] = (),
    taps: dict[int, str] | None = None,
) -> list[str]:
    return standby_argv(
        argv,
        binary="/usr/bin/qemu-system-x86_64",
        ram=ram or (PC_RAM,),
        qmp_path=f"{directory}/qmp.sock",
        directory=directory,
        machine=machine,
        replace=replace,
        extra=extra,
        taps=taps,
    )


def derived(
    *options: str, replace: dict[str, str] | None = None, taps: dict[int, str] | None = None
) -> list[str]:
    """What the standby has for `options` of a plain VM, without what every standby has."""
    words = derive(["qemu", "-m", "256", "-display", "none", *options], replace=replace, taps=taps)
    start = words.index("-display") + 2
    end = next(i for i, word in enumerate(words) if word.startswith("memory-backend-file")) - 1
    return words[start:end]


def refusal(*options: str) -> str:
    with pytest.raises(CannotDerive) as caught:
        derived(*options)
    return f"{caught.value.option}: {caught.value.why}"


def values(words: Sequence[str], name: str) -> list[str]:
    return [option.word or "" for option in parse(words).named(name)]


# Parsing.


def test_options_come_with_one_dash_or_two_and_images_with_none() -> None:
    assert parse(["qemu", "--m", "256", "-S", "disk.img", "-append", "-x -S"]) == CommandLine(
        "qemu", (Option("m", "256"), Option("S"), Option("", "disk.img"), Option("append", "-x -S"))
    )


def test_an_option_not_known_owns_the_next_word_unless_that_has_a_dash() -> None:
    line = parse(["qemu", "-id", "100", "-brand-new", "-S", "-other"])
    assert line.options == (Option("id", "100"), Option("brand-new"), Option("S"), Option("other"))


def test_an_empty_command_line_has_no_options() -> None:
    assert parse([]) == CommandLine("", ())
    assert parse(["qemu"]).words() == ["qemu"]


def test_an_option_cut_off_before_its_word_is_kept_as_it_is() -> None:
    assert parse(["qemu", "-m"]).words() == ["qemu", "-m"]


option_names = st.sampled_from(sorted(FLAGS | WITH_WORD)).map(lambda name: f"-{name}")


@given(
    st.lists(option_names | st.text(max_size=6), max_size=12).filter(
        lambda words: not any(word.startswith("--") or word == "-" for word in words)
    )
)
def test_the_words_come_out_as_they_went_in(words: list[str]) -> None:
    assert parse(["qemu", *words]).words() == ["qemu", *words]


# Memory.


def test_plain_memory_gets_a_backend_named_as_the_block() -> None:
    assert derive(["qemu-system-x86_64", "-m", "256"], machine="pc-i440fx-7.2") == [
        "/usr/bin/qemu-system-x86_64", "-machine", "pc-i440fx-7.2,memory-backend=pc.ram",
        "-m", "256", "-display", "none",
        "-object", "memory-backend-file,id=pc.ram,size=268435456,mem-path=/proc/self/fd/7,share=on,"
        "x-use-canonical-path-for-ramblock-id=off",
        *OUR_END,
    ]  # fmt: skip


def test_the_machine_is_the_one_qemu_resolved_with_all_that_was_said_about_it() -> None:
    words = derive(
        ["qemu", "-machine", "pc,accel=kvm,usb=off", "-m", "256", "-M", "usb=on"], machine="pc-i440fx-7.2"
    )
    assert values(words, "machine") == ["pc-i440fx-7.2,accel=kvm,usb=on,memory-backend=pc.ram"]


def test_without_a_resolved_machine_the_last_type_said_counts() -> None:
    assert values(derive(["qemu", "-M", "pc", "-machine", "type=q35"]), "machine") == [
        "q35,memory-backend=pc.ram"
    ]


def test_slots_and_maximum_stay() -> None:
    argv = ["qemu", "-machine", "pc,accel=kvm", "-m", "size=1G,slots=2,maxmem=4G"]
    assert values(derive(argv, RamBlock("pc.ram", 1 << 30, 9)), "m") == ["size=1G,slots=2,maxmem=4G"]


def test_a_backend_is_replaced_at_its_place_and_keeps_its_form() -> None:
    words = derive(LIBVIRT)
    backend = json.loads(values(words, "object")[0])
    assert backend == {
        "qom-type": "memory-backend-file", "id": "pc.ram", "size": 268435456, "align": 2 * MIB,
        "mem-path": "/proc/self/fd/7", "share": True, "x-use-canonical-path-for-ramblock-id": False,
    }  # fmt: skip
    assert len(values(words, "object")) == 1
    assert values(words, "machine")[0].endswith(",memory-backend=pc.ram")


def test_numa_nodes_and_dimms_have_a_file_each() -> None:
    argv = [
        "qemu", "-m", "size=256M,slots=2,maxmem=1G",
        "-object", "memory-backend-ram,id=n0,size=128M,prealloc=on,host-nodes=0,policy=bind",
        "-object", "memory-backend-memfd,id=n1,size=128M,hugetlb=on,merge=off",
        "-numa", "node,memdev=n0", "-numa", "node,memdev=n1",
        "-object", "memory-backend-file,id=d0,size=64M,mem-path=/dev/shm/d0,share=on",
        "-device", "pc-dimm,memdev=d0",
    ]  # fmt: skip
    ram = [RamBlock("n0", 128 * MIB, 3), RamBlock("n1", 128 * MIB, 4), RamBlock("d0", 64 * MIB, 5)]
    end = ",share=on,x-use-canonical-path-for-ramblock-id=off"
    assert values(derive(argv, *ram), "object") == [
        "memory-backend-file,id=n0,size=134217728,align=2097152,mem-path=/proc/self/fd/3" + end,
        "memory-backend-file,id=n1,size=134217728,merge=off,mem-path=/proc/self/fd/4" + end,
        "memory-backend-file,id=d0,size=67108864,mem-path=/proc/self/fd/5" + end,
    ]
    assert "memory-backend" not in values(derive(argv, *ram), "machine")[0]


def test_a_block_under_its_path_in_old_machine_types_keeps_that_name() -> None:
    argv = [
        "qemu", "-machine", "pc-i440fx-3.1,memory-backend=m0",
        "-object", "memory-backend-file,id=m0,size=256M,mem-path=/dev/hugepages",
    ]  # fmt: skip
    backend = Keyval.parse(values(derive(argv, RamBlock("/objects/m0", 256 * MIB, 5)), "object")[0])
    assert (backend.get("id"), backend.get("x-use-canonical-path-for-ramblock-id")) == ("m0", "on")


def test_a_backend_without_a_block_is_refused() -> None:
    with pytest.raises(CannotDerive) as caught:
        derive(["qemu", "-m", "256", "-object", "memory-backend-ram,id=x,size=1M"])
    assert caught.value.option == "-object x"


def test_memory_added_after_the_start_is_refused() -> None:
    with pytest.raises(CannotDerive) as caught:
        derive(["qemu", "-m", "256"], PC_RAM, RamBlock("mem1", MIB, 8))
    assert caught.value.option == "mem1"


def test_no_block_for_plain_memory_is_refused() -> None:
    with pytest.raises(CannotDerive):
        standby_argv(["qemu"], binary="q", ram=[], qmp_path=QMP, directory=DIRECTORY)


@pytest.mark.parametrize(
    ("argv", "memory"),
    [
        (["qemu", "-m", "8"], ("pc.ram",)),
        (["qemu", "-object", "memory-backend-ram,id=mem1", "-device", "pc-dimm,memdev=mem1"],
         ("pc.ram", "mem1")),
        (["qemu", "-M", "pc,memory-backend=mem1", "-object", "memory-backend-ram,id=mem1"], ("mem1",)),
        (["qemu", "-numa", "node,memdev=mem1", "-object", '{"qom-type":"memory-backend-ram","id":"mem1"}'],
         ("mem1",)),
    ],
)  # fmt: skip
def test_guest_memory_is_told_from_the_memory_of_devices(argv: list[str], memory: tuple[str, ...]) -> None:
    blocks = {"vga.vram": 16 * MIB, "pc.ram": 8 * MIB, "mem1": MIB, "pc.bios": 1 << 18, "0000:00/x.ram": 9}
    assert guest_memory(parse(argv), blocks) == memory


# What QEMU makes on its host.


@pytest.mark.parametrize(
    ("option", "standby"),
    [
        (["-qmp", "unix:/tmp/vm.qmp,server,nowait"], f"unix:{DIRECTORY}/vm.qmp,server=on,wait=off"),
        (["-monitor", "unix:/tmp/vm.hmp,server=on"], f"unix:{DIRECTORY}/vm.hmp,server=on,wait=off"),
        (["-serial", "mon:unix:/tmp/con,server=on,wait=off"], f"mon:unix:{DIRECTORY}/con,server=on,wait=off"),
        (["-serial", "file:/var/log/a,b.log"], f"file:{DIRECTORY}/a,b.log"),
        (["-serial", "tcp:0:4444,server"], "tcp:0:4444,server=on,wait=off"),
        (["-serial", "tcp:0:4444"], "tcp:0:4444"),
        (["-debugcon", "file:/tmp/bios.log"], f"file:{DIRECTORY}/bios.log"),
        (["-parallel", "null"], "null"),
        (["-serial", "stdio"], "stdio"),
        (["-serial", "chardev:c0"], "chardev:c0"),
        (["-serial", "file:/dev/null"], "file:/dev/null"),
        (["-D", "/var/log/vm.log"], f"{DIRECTORY}/vm.log"),
        (["-vnc", "unix:/tmp/vnc,password=on"], f"unix:{DIRECTORY}/vnc,password=on"),
        (["-vnc", "127.0.0.1:0"], "127.0.0.1:0"),
        (["-spice", "unix=on,addr=/tmp/sp,disable-ticketing=on"],
         f"unix=on,addr={DIRECTORY}/sp,disable-ticketing=on"),
        (["-spice", "port=5900"], "port=5900"),
        (["-chardev", "socket,id=a,path=/tmp/a,server"],
         f"socket,id=a,path={DIRECTORY}/a,server=on,wait=off"),
        (["-chardev", "socket,id=a,path=x,server=on,abstract=on"],
         "socket,id=a,path=x,server=on,abstract=on,wait=off"),
        (["-chardev", "socket,id=a,fd=31,server=on,wait=off"],
         f"socket,id=a,server=on,wait=off,path={DIRECTORY}/a.sock"),
        (["-chardev", "file,id=f,path=/tmp/q.log,append=on"],
         f"file,id=f,path={DIRECTORY}/q.log,append=on"),
        (["-chardev", "file,id=f,path=/tmp/x/qmp.sock"], f"file,id=f,path={DIRECTORY}/qmp.sock.2"),
        (["-chardev", "pty,id=p,logfile=/tmp/p.log"], f"pty,id=p,logfile={DIRECTORY}/p.log"),
        (["-chardev", "socket,id=e,path=/run/qmeventd.sock,reconnect=5"],
         "socket,id=e,path=/run/qmeventd.sock,reconnect=5"),
        (["-object", "filter-dump,id=d,netdev=n,file=/tmp/n.pcap"],
         f"filter-dump,id=d,netdev=n,file={DIRECTORY}/n.pcap"),
        (["-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=/tmp/n"],
         f"stream,id=n,server=on,addr.type=unix,addr.path={DIRECTORY}/n"),
        (["-netdev", '{"type":"dgram","id":"n","local":{"type":"unix","path":"/tmp/n"}}'],
         f'{{"type":"dgram","id":"n","local":{{"type":"unix","path":"{DIRECTORY}/n"}}}}'),
        (["-netdev", "tap,id=net0,ifname=tap1,script=/etc/up"],
         "tap,id=net0,ifname=tap1,script=no,downscript=no"),
        (["-audiodev", "wav,id=w,path=/tmp/w.wav"], f"wav,id=w,path={DIRECTORY}/w.wav"),
        (["-audiodev", "pa,id=w,server=/run/pulse,out.name=x"], "none,id=w"),
        (["-display", "gtk,gl=on"], "none"),
        (["-display", "vnc=unix:/tmp/v"], f"vnc=unix:{DIRECTORY}/v"),
        (["-display", "egl-headless,rendernode=/dev/dri/r"], "egl-headless,rendernode=/dev/dri/r"),
        (["-mon", "chardev=m,mode=control"], "chardev=m,mode=control"),
    ],
)  # fmt: skip
def test_what_qemu_makes_on_its_host_moves_into_the_standbys_directory(
    option: list[str], standby: str
) -> None:
    assert derived(*option) == [option[0], standby]


def test_two_files_of_one_name_stay_two_and_one_file_named_twice_stays_one() -> None:
    words = derived("-serial", "file:/a/log", "-serial", "file:/b/log", "-debugcon", "file:/a/log")
    assert words[1::2] == [f"file:{DIRECTORY}/log", f"file:{DIRECTORY}/log.2", f"file:{DIRECTORY}/log"]


def test_logs_on_passed_descriptors_become_files_named_by_their_chardev() -> None:
    words = derived(
        "-add-fd", "set=0,fd=33", "-chardev", "file,id=s0,path=/dev/fdset/0", "-add-fd", "set=1,fd=34",
        "-chardev", "file,id=s1,path=/dev/fdset/1",
    )  # fmt: skip
    assert values(["qemu", *words], "chardev") == [
        f"file,id=s0,path={DIRECTORY}/s0.log",
        f"file,id=s1,path={DIRECTORY}/s1.log",
    ]
    assert "-add-fd" not in words


@pytest.mark.parametrize(
    "options",
    [
        ["-incoming", "tcp:0:4444"], ["-S"], ["-daemonize"], ["-pidfile", "/run/vm.pid"], ["-loadvm", "snap"],
        ["-mem-path", "/dev/hugepages"], ["-mem-prealloc"], ["-s"], ["-gdb", "unix:/tmp/gdb,server=on"],
        ["-qtest", "unix:/tmp/qtest"], ["-trace", "file=/tmp/t"], ["-full-screen"], ["-curses"],
        ["-add-fd", "set=0,fd=3"],
        ["-chardev", "socket,id=curling-qmp,path=/x,server=on"], ["-mon", "chardev=curling-qmp,mode=control"],
        ["-object", "secret,id=masterKey0,format=raw,file=/var/lib/vm/key"],
    ],
)  # fmt: skip
def test_how_the_primary_was_started_is_left_out(options: list[str]) -> None:
    assert derived(*options) == []


@pytest.mark.parametrize(
    "options",
    [
        ["-kernel", "/boot/vmlinuz", "-initrd", "/boot/initrd", "-append", "console=ttyS0 -- /dev/fd/0"],
        ["-cpu", "host"], ["-accel", "kvm"], ["-smp", "2"], ["-no-shutdown"], ["-no-reboot"], ["-snapshot"],
        ["-sandbox", "on"], ["-uuid", "c7a5fdbd-cdaf-9455-926a-d65c16db1809"],
        ["-name", "a,,b,debug-threads=on"],
        ["-nographic"], ["-vga", "std"], ["-fw_cfg", "name=opt/a,string=b"], ["-global", "a.b=c"],
        ["-set", "device.net0.mac=52:54:00:00:00:01"],
        ["-object", "secret,id=k,data=x", "-object", "tls-creds-x509,id=t,dir=/etc/pki,passwordid=k"],
        ["-object", "secret,id=k,file=/etc/key", "-blockdev", "driver=luks,key-secret=k,node-name=n,file=f"],
        ["/images/disk.img"], ["-drive", "file=a,if=virtio,readonly"], ["-netdev", "user,id=n"],
        ["-device", "virtio-9p-pci,fsdev=f,mount_tag=t"], ["-usb"], ["-unheard-of", "value"],
    ],
)  # fmt: skip
def test_the_machine_itself_is_not_touched(options: list[str]) -> None:
    assert derived(*options) == options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["-readconfig", "/etc/vm.cfg"], "-readconfig"),
        (["-run-with", "chroot=/srv"], "-run-with"),
        (["-preconfig"], "-preconfig"),
        (["-set", "chardev.c.path=/x"], "-set"),
        (["-netdev", "tap,id=hostnet0,fd=35,vhost=on,vhostfd=36"], "-netdev hostnet0: fd="),
        (["-netdev", '{"type":"tap","fd":"35","vhost":true,"id":"hostnet0"}'], "-netdev hostnet0: fd=35"),
        (["-netdev", "tap,id=n,fds=3:4"], "fds="),
        (["-netdev", "stream,id=n,addr.type=fd,addr.str=5"], "addr.type=fd"),
        (["-nic", "tap,fd=3"], "-nic: fd="),
        (["-device", "vhost-vsock-pci,id=v,guest-cid=3,vhostfd=28"], "-device v: vhostfd="),
        (["-blockdev", "driver=file,filename=/dev/fdset/2,node-name=d"], "-blockdev"),
        (["/dev/fd/3"], "the disk image by itself: it uses a descriptor"),
        (["-chardev", "socket,id=c,fd=3"], "-chardev c"),
        (["-chardev", "socket,id=tpm,path=/run/swtpm.sock"], "-chardev tpm: /run/swtpm.sock"),
        (["-chardev", "pipe,id=c,path=/tmp/fifo"], "standby.replace"),
        (["-serial", "/dev/ttyS0"], "/dev/ttyS0"),
        (["-serial", "pipe:/tmp/fifo"], "/tmp/fifo"),
        (["-serial", "unix:/tmp/concentrator"], "/tmp/concentrator"),
        (["-netdev", "dgram,id=n,local.type=unix,local.path=/a,remote.type=unix,remote.path=/b"], "/b"),
        (["-object", "{not json"], "-object: its properties cannot be read"),
        (["-chardev", f"socket,id=c,server=on,path=/{'x' * 100}"], "too long"),
    ],
)
def test_what_cannot_be_known_is_refused_by_name(options: list[str], named: str) -> None:
    assert named in refusal(*options)


def test_a_refusal_does_not_show_secrets() -> None:
    problem = refusal("-object", "x-remote-object,id=o,fd=3,password=geheim")
    assert "-object o" in problem
    assert "geheim" not in problem


# What the administrator says.


@pytest.mark.parametrize(
    ("replace", "options", "standby"),
    [
        ({"/images": "/mnt/b"}, ["-drive", "file=/images/a,,b.qcow2"], ["-drive", "file=/mnt/b/a,,b.qcow2"]),
        ({"/images/a": "/b"}, ["-drive", "file=/images/ab"], ["-drive", "file=/images/ab"]),
        ({"/images": "/b"}, ["-drive", "file=/my/images/x"], ["-drive", "file=/my/images/x"]),
        ({"/a": "/b", "/b": "/a"}, ["-kernel", "/a", "-initrd", "/b"], ["-kernel", "/b", "-initrd", "/a"]),
        ({"/a": "/b", "/a/c": "/d"}, ["-kernel", "/a/c"], ["-kernel", "/d"]),
        ({"tap0": "tap9"}, ["-netdev", "tap,id=n,ifname=tap0"],
         ["-netdev", "tap,id=n,ifname=tap9,script=no,downscript=no"]),
        ({"/tmp/q": "/tmp/r"}, ["-qmp", "unix:/tmp/q,server=on"], ["-qmp", "unix:/tmp/r,server=on,wait=off"]),
        ({"/run/swtpm": "/run/b"}, ["-chardev", "socket,id=c,path=/run/swtpm/s"],
         ["-chardev", "socket,id=c,path=/run/b/s"]),
        ({"/dev/ttyS0": "/dev/ttyS0"}, ["-serial", "/dev/ttyS0"], ["-serial", "/dev/ttyS0"]),
        ({"x": "a,b"}, ["-blockdev", '{"driver":"file","filename":"/i/x"}'],
         ["-blockdev", '{"driver":"file","filename":"/i/a,b"}']),
        ({"": "nothing"}, ["-kernel", "/k"], ["-kernel", "/k"]),
    ],
)  # fmt: skip
def test_the_administrators_word_goes_first(
    replace: dict[str, str], options: list[str], standby: list[str]
) -> None:
    assert derived(*options, replace=replace) == standby


def test_extra_words_are_added_once() -> None:
    extra = ["-device", "vmcoreinfo"]
    once = derive(["qemu", "-m", "256"], extra=extra)
    assert once[-len(OUR_END) - 2 : -len(OUR_END)] == extra
    assert derive(once, extra=extra) == once


# Whole command lines, and back.


def test_libvirts_command_line() -> None:
    words = derive(LIBVIRT)
    assert values(words, "chardev")[:-1] == [
        f"socket,id=charmonitor,server=on,wait=off,path={DIRECTORY}/charmonitor.sock",
        f"pty,id=charserial0,logfile={DIRECTORY}/charserial0.log,logappend=on",
    ]
    for name in (
        "name",
        "accel",
        "cpu",
        "m",
        "smp",
        "uuid",
        "device",
        "blockdev",
        "netdev",
        "rtc",
        "sandbox",
    ):
        assert values(words, name) == values(LIBVIRT, name)
    assert words[-len(OUR_END) :] == OUR_END
    assert words.count("-S") == 1


def test_proxmoxs_command_line() -> None:
    words = derive(PROXMOX, machine="pc-i440fx-7.2+pve0")
    assert values(words, "chardev")[:-1] == [
        f"socket,id=qmp,path={DIRECTORY}/100.qmp,server=on,wait=off",
        "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5",
        f"socket,path={DIRECTORY}/100.qga,server=on,wait=off,id=qga0",
    ]
    assert values(words, "vnc") == [f"unix:{DIRECTORY}/100.vnc,password=on"]
    assert values(words, "machine") == ["pc-i440fx-7.2+pve0,memory-backend=pc.ram"]
    assert not {"-daemonize", "-pidfile"} & set(words)
    assert values(words, "netdev") == ["type=tap,id=net0,ifname=tap100i0,script=no,vhost=on,downscript=no"]
    for name in ("id", "cpu", "device", "drive", "iscsi", "smbios", "object"):
        assert values(words, name)[: len(values(PROXMOX, name))] == values(PROXMOX, name)


@pytest.mark.parametrize(
    ("given", "opened"),
    [
        ("tap,id=n,fd=35,vhost=on,vhostfd=36", "tap,id=n,vhost=on,ifname=vnet4,script=no,downscript=no"),
        (
            "tap,fds=35:37,id=n,vhostfds=38:39,vhost=on",
            "tap,id=n,vhost=on,ifname=vnet4,queues=2,script=no,downscript=no",
        ),
        (
            '{"type":"tap","fd":"35","vhost":true,"vhostfd":"36","id":"hostnet0"}',
            '{"type":"tap","vhost":true,"id":"hostnet0","ifname":"vnet4","script":"no","downscript":"no"}',
        ),
    ],
)
def test_taps_that_were_passed_as_descriptors_are_opened_by_their_names(given: str, opened: str) -> None:
    assert derived("-netdev", given, taps={35: "vnet4", 37: "vnet4", 40: "vnet5"}) == ["-netdev", opened]


def test_queues_of_different_taps_are_no_card() -> None:
    with pytest.raises(CannotDerive):
        derived("-netdev", "tap,id=n,fds=35:40", taps={35: "vnet4", 40: "vnet5"})


@pytest.mark.parametrize("argv", [LIBVIRT, PROXMOX, ["qemu", "-m", "256", "-nographic", "x.img"]])
def test_going_back_and_forth_changes_nothing_but_the_directory(argv: list[str]) -> None:
    there = derive(argv, machine="pc-i440fx-7.2", directory="/run/b")
    back = derive(there, machine="pc-i440fx-7.2", directory="/run/a")
    assert back == [word.replace("/run/b", "/run/a") for word in there]
    assert derive(back, machine="pc-i440fx-7.2", directory="/run/b") == there


def test_devices_added_later_can_be_told_from_those_of_the_command_line() -> None:
    assert device_ids(PROXMOX) == {"pci.1", "qga0", "virtioscsi0", "scsi0", "net0"}


@given(st.lists(st.sampled_from([*LIBVIRT[1:], *PROXMOX[1:], "-readconfig", ""]), max_size=12))
def test_any_mix_of_words_is_derived_or_refused(words: list[str]) -> None:
    try:
        result = derive(["qemu", *words])
    except CannotDerive:
        return
    assert result[-len(OUR_END) :] == OUR_END
