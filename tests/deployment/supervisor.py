"""What systemd does for a socket and its service, for tests: holds the port, restarts, and loses no connection.

    python3 supervisor.py run CONTROL PORT CURRENT COMMAND...
    python3 supervisor.py restart CONTROL

``COMMAND`` is run with the socket as file descriptor 3 for as long as the link CURRENT is there, again when it dies.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

#: Seconds for a service that is told to end; and before one that died begins again.
STOP_S, AGAIN_S = 60, 0.2


class Service:
    def __init__(self, listening: socket.socket, current: Path, command: list[str]) -> None:
        self.listening, self.current, self.command = listening, current, command
        self.process: subprocess.Popen[bytes] | None = None
        self.again = 0.0

    def keep(self) -> None:
        """Begin, where it should run and does not."""
        if self.process and self.process.poll() is not None:
            self.process, self.again = None, time.monotonic() + AGAIN_S
        if self.process is None and os.path.lexists(self.current) and time.monotonic() >= self.again:
            number = self.listening.fileno()
            # LISTEN_PID is the service's own, which only it knows before it begins.
            script = f'exec 3<&{number}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", script, "sh", *self.command], pass_fds=[number], stdin=subprocess.DEVNULL
            )

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
            self.again = 0.0


def run(control: str, port: int, current: str, command: list[str]) -> None:
    listening = socket.create_server(("127.0.0.1", port), backlog=1024)
    orders = socket.socket(socket.AF_UNIX)
    orders.bind(control)
    orders.listen()
    orders.settimeout(0.05)
    service = Service(listening, Path(current), command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            service.keep()
            try:
                asked, _ = orders.accept()
            except TimeoutError:
                continue
            with asked:
                service.stop()
                service.keep()
                try:
                    asked.sendall(b"done")
                except OSError:
                    # Whoever asked was killed.
                    continue
    finally:
        service.stop()


def restart(control: str) -> int:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(control)
        return 0 if asking.recv(4) == b"done" else 1


if __name__ == "__main__":
    if sys.argv[1] == "restart":
        sys.exit(restart(sys.argv[2]))
    run(sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:])
