"""Runs in a lab host: asks redis at each of the addresses given for increments, for ever, one at a time.

Prints each answer as JSON: the address, the number, and how many seconds went by since the answer before.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

_REDIS = 6379


def increment(address: str) -> None:
    with socket.create_connection((address, _REDIS)) as sock, sock.makefile("rwb") as stream:
        last = time.monotonic()
        key = f"vlan-{address}".encode()
        while True:
            stream.write(b"*2\r\n$4\r\nINCR\r\n$%d\r\n%s\r\n" % (len(key), key))
            stream.flush()
            answer = stream.readline()
            now = time.monotonic()
            told = {"address": address, "number": int(answer[1:]), "pause": round(now - last, 3)}
            sys.stdout.write(json.dumps(told) + "\n")
            last = now
            time.sleep(0.05)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        threading.Thread(target=increment, args=(each,)).start()
