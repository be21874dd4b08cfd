"""Runs a command where nothing but this machine can be reached: in a network namespace with a loopback and no route.

    python tests/offline.py COMMAND...

Where no namespace can be made the command runs as it is, and a line says so.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys

# linux/sched.h, linux/sockios.h, linux/if.h
_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1


def isolate() -> None:
    """Enter the namespace.

    Raises:
        OSError: it is not permitted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEWNET) != 0:
        if libc.unshare(_NEWUSER | _NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        maps = (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1"))
        for name, content in maps:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123
                file.write(content)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


if __name__ == "__main__":
    try:
        isolate()
    except OSError as error:
        print(f"No network namespace ({error.strerror}): the tests of servers run with the network.", file=sys.stderr)
    os.execvp(sys.argv[1], sys.argv[1:])
