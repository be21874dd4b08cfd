"""systemd units: the socket is systemd's, so that a restart loses no connection, and the service is shut in.

systemd.exec(5) and systemd.socket(5) say what each line does.
"""

from __future__ import annotations

import re

from glmexport.deployment.site import UNIT, Server

#: Seconds that running answers have when the service is told to end, and a little more.
_STOP_S = 60
_SIMPLE = re.compile(r"[A-Za-z0-9@%+=:,./_-]+")


def socket_unit(server: Server) -> str:
    """Return the socket's unit, which keeps connections waiting while the service restarts."""
    return f"""\
[Unit]
Description=glmexport, the socket

[Socket]
ListenStream={_bracketed(server.listen)}:{server.port}
Backlog=1024

[Install]
WantedBy=sockets.target
"""


def service_unit(server: Server) -> str:
    """Return the unit that serves ``current``.

    It reads nothing else of the machine's, writes nothing, and reaches nothing.

    No MemoryDenyWriteExecute: CUDA and JIT compilers of execution providers need such memory.
    """
    program, *options = server.serve_command
    current = f"{server.root}/current"
    # Of the program's own path no variable is replaced.
    command = " ".join([_word(program), *(_word(each).replace("$", "$$") for each in (*options, current))])
    credential = ""
    if server.api_key_file:
        # systemd reads it for a user that cannot.
        command += " --api-key-file %d/api-key"
        credential = f"LoadCredential=api-key:{_plain(server.api_key_file)}\n"
    allowed = "".join(f"IPAddressAllow={network}\n" for network in ("localhost", *server.allow))
    return f"""\
[Unit]
Description=glmexport, serving {_plain(current)}
Requires={UNIT}.socket
After={UNIT}.socket
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={command}
{credential}Restart=on-failure
RestartSec=2
TimeoutStartSec={server.ready_s:.0f}
TimeoutStopSec={_STOP_S}
WatchdogSec=60
KillSignal=SIGTERM
DynamicUser=yes
Environment=ORT_DISABLE_TELEMETRY=1 HF_HUB_OFFLINE=1 DO_NOT_TRACK=1
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
NoNewPrivileges=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
CapabilityBoundingSet=
SystemCallArchitectures=native
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
IPAddressDeny=any
{allowed}UMask=0077

[Install]
WantedBy=multi-user.target
"""


def _plain(value: str) -> str:
    """A value in which systemd replaces nothing."""
    return value.replace("%", "%%")


def _word(value: str) -> str:
    """A word of a command, as systemd.syntax(7) reads it."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return _plain(value if _SIMPLE.fullmatch(value) else f'"{escaped}"')


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
