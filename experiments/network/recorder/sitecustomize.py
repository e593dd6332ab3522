"""Records what a Python process and its children connect to; Python imports it at start from a folder of PYTHONPATH.

Each look-up of a name and each connection to an address that is not of this machine is a line of JSON in the file that
NETWORK_LOG names: the event, the address, and the functions that led to it. Python raises these audit events (PEP 578)
for its own sockets; code in C or Rust that opens sockets by itself is seen by strace alone.
"""

import ipaddress
import json
import os
import socket
import sys
import traceback

ADDRESS = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1}  # event: which of its arguments
NAME = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}
LOG = os.environ.get("NETWORK_LOG")


def is_local(host) -> bool:
    if host in (None, "", b"", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(os.fsdecode(host).split("%")[0]).is_loopback
    except ValueError:
        return False


def record(event: str, arguments: tuple) -> None:
    if event in ADDRESS:
        address = arguments[ADDRESS[event]]
        if not isinstance(address, tuple):  # a path: a socket of this machine
            return
        host = address[0]
    elif event in NAME:
        host = arguments[NAME[event]]
    else:
        return
    if is_local(host):
        return
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack()[:-1]]
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(json.dumps({"event": event, "host": os.fsdecode(host), "argv": sys.argv, "stack": frames}) + "\n")


if LOG:
    sys.addaudithook(record)
