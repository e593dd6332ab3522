"""Records the connections of a Python process and its children. Python imports this module at start-up from PYTHONPATH.

Every name look-up and every connection to another machine is written as a line of JSON to the file in the environment
variable NETWORK_LOG: the event, the address, and the call stack. Python raises these audit events (PEP 578) for its own
sockets; code in C or Rust that opens sockets by itself is not recorded.
"""

import ipaddress
import json
import os
import socket
import sys
import traceback

# Index of the address, or of the host name, in the arguments of an event.
ADDRESS_INDEX = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1}
NAME_INDEX = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}
LOG = os.environ.get("NETWORK_LOG")


def is_local(host: str | bytes | None) -> bool:
    """Whether a name or address is of this machine."""
    if host in (None, "", b"", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(os.fsdecode(host).split("%")[0]).is_loopback
    except ValueError:
        return False


def record(event: str, arguments: tuple) -> None:
    """Write an audit event to the log if it is a connection to another machine."""
    if event in ADDRESS_INDEX:
        address = arguments[ADDRESS_INDEX[event]]
        if not isinstance(address, tuple):  # the path of a Unix socket
            return
        host = address[0]
    elif event in NAME_INDEX:
        host = arguments[NAME_INDEX[event]]
    else:
        return
    if is_local(host):
        return
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack()[:-1]]
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(json.dumps({"event": event, "host": os.fsdecode(host), "argv": sys.argv, "stack": frames}) + "\n")


if LOG:
    sys.addaudithook(record)
