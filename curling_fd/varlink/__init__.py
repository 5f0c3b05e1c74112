"""Varlink: the protocol of the control socket, both ends of it."""
