"""Curling: fault tolerance for running QEMU/KVM virtual machines, beside an unpatched QEMU."""

__version__ = "0.1.0"
