"""The interface every Varlink service has, org.varlink.service: who it is and what it offers. No I/O.

Source: https://varlink.org/Service.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from curling_fd.varlink import protocol
from curling_fd.varlink.idl import Interface, parse
from curling_fd.varlink.protocol import Reply

SERVICE = parse(
    """\
# What every Varlink service tells about itself.
interface org.varlink.service

# Who made the service, what it is, and the interfaces it has.
method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

# The text of one of its interfaces.
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
"""
)


@frozen
class Identity:
    """What GetInfo answers about a service."""

    vendor: str
    product: str
    version: str
    url: str


def answer(identity: Identity, interface: Interface, method: str, parameters: Mapping[str, Any]) -> Reply:
    """Answer a call of org.varlink.service whose parameters were checked.

    Args:
        identity: of the service.
        interface: the one the service has besides this one.
        method: the method's own name.
        parameters: of the call.
    """
    if method == "GetInfo":
        return Reply(
            {
                "vendor": identity.vendor,
                "product": identity.product,
                "version": identity.version,
                "url": identity.url,
                "interfaces": sorted([interface.name, SERVICE.name]),
            }
        )
    for known in (interface, SERVICE):
        if parameters["interface"] == known.name:
            return Reply({"description": known.text})
    return protocol.interface_not_found(parameters["interface"])
