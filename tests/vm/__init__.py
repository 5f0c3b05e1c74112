"""The lab of virtual hosts: what needs a kernel, an init and a power supply of its own is tested in here.

image     the disk of a host: Debian 13 with QEMU, made once
payload   a second, read-only disk with what is under test: wheels, unit files, the guest
host      a host: an emulated machine, its power, its console, its journal
agent     runs in the host and does what `control` asks, over a line that is no network
cable     the networks between hosts, each end of which can be cut, delayed and slowed down
readme    the commands of README.md, which are what is executed
steps     those commands, with what a lab must do otherwise
client    asks the guest for answers, from outside both hosts
lab       two hosts, a client and a guest, put together
timeline  what happened when, kept below build/vm
tidy      keeps the cache from filling up
"""
