"""A session of ONNX Runtime is created by its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime


@dataclass(frozen=True)
class SessionSettings:
    """The settings of a session: its execution ``provider``, threads, entries of its ``config``, and its profile.

    ``profile`` begins the name of the profile that the session writes when it ends.
    """

    provider: str
    threads: int
    provider_options: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    profile: Path | None = None


def create_session(graph: Path, settings: SessionSettings) -> onnxruntime.InferenceSession:
    """Return a session of a ``graph``.

    Raises:
        Exception: ONNX Runtime refuses the graph; its errors have no base class of their own.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.log_severity_level = 3
    for name, value in settings.config.items():
        options.add_session_config_entry(name, value)
    if settings.profile:
        options.enable_profiling, options.profile_file_prefix = True, str(settings.profile)
    provider = (settings.provider, dict(settings.provider_options))
    return onnxruntime.InferenceSession(str(graph), options, providers=[provider])


def end_profile(session: onnxruntime.InferenceSession) -> None:
    """Write the session's profile, if it was asked for one."""
    if session.get_session_options().enable_profiling:
        session.end_profiling()
