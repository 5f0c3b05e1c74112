"""Shared tooling for tests, benchmarks and the demo: guests, QEMU builds, hosts made of namespaces.

Nothing here is part of the installed package. Everything big lives outside the tree, see `cache`.
"""
