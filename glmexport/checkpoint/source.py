"""The source of a checkpoint: the embedded one, a directory, or the hub; and what is refused on sight."""

from __future__ import annotations

import os
import re
from pathlib import Path

from glmexport.foundation.errors import CheckpointError, GlmexportError, MachineError
from glmexport.foundation.files import listed, optional, read_json, unreadable
from glmexport.foundation.progress import Progress

DEMO = "demo"

PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "README*",
    "LICENSE*",
)
"""The files that are downloaded of a repository; code and pickles are not."""

_HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")


def resolve(source: str) -> Path:
    """Return the directory of ``source``, downloaded first if it names a repository of the hub.

    ``demo`` is the checkpoint that comes with the project (a directory of that name is ``./demo``); anything else is
    an existing directory or, where there is none, a hub id ``owner/name`` or ``owner/name@revision``. The hub
    is reached only in that last case, through its own cache, and its HF_HOME and HF_HUB_OFFLINE are honoured.

    Raises:
        CheckpointError: neither a directory nor a hub id, or the hub has no such repository for us.
        MachineError: the hub cannot be reached and its cache lacks the checkpoint, or the disk is full.
    """
    if source == DEMO:
        from glmexport.demo import demo_checkpoint

        return demo_checkpoint()
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except OSError as error:
        raise unreadable(Path(source), error) from error
    except RuntimeError as error:  # What expanduser raises for ~nobody.
        raise CheckpointError(
            f"{source} has no home directory: {error}.", next_step="Give the path in full."
        ) from error
    if exists:
        raise CheckpointError(f"{source} is a file.", next_step="Give the directory that the checkpoint is in.")
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None or ".." in source:
        raise CheckpointError(
            f"There is no directory {source!r}, and it is no hub id either.",
            next_step="Give an existing directory, owner/name or owner/name@revision of the hub, or demo.",
        )
    return _download(hub_id["repository"], hub_id["revision"])


def _download(repository: str, revision: str | None) -> Path:
    # Before the import, because the hub's library reads it then; and after, in case it was imported already.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from huggingface_hub import constants, snapshot_download

    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        directory = snapshot_download(repository, revision=revision, allow_patterns=list(PATTERNS))
    except MemoryError:
        raise
    except Exception as error:
        # The library lets errors of its transports through (two of HTTP, Xet, its own), which share no base.
        raise _hub_error(error, repository, revision) from error
    return Path(directory)


def _hub_error(error: Exception, repository: str, revision: str | None) -> GlmexportError:
    from huggingface_hub import constants, errors

    name = repository if revision is None else f"{repository}@{revision}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = constants.HF_HUB_OFFLINE
        return MachineError(
            f"There is no directory {repository!r}, {name} is not complete in the hub's cache "
            f"{constants.HF_HUB_CACHE}, and "
            + ("HF_HUB_OFFLINE forbids the network." if offline else f"{constants.ENDPOINT} cannot be reached."),
            next_step=("Unset HF_HUB_OFFLINE" if offline else "Check the network")
            + f", or run `hf download {repository}` on a connected machine and give the directory here.",
        )
    refusal = _refusal(error, repository, revision)
    if refusal is not None:
        return refusal
    if isinstance(error, OSError) and not isinstance(error, errors.HfHubHTTPError) and error.filename:
        return unreadable(Path(str(error.filename)), error)
    reason = (str(error).strip().splitlines() or [""])[0]
    return MachineError(
        f"{name} could not be downloaded: {type(error).__name__}: {reason}.",
        next_step=f"Check the network and the space in {constants.HF_HUB_CACHE}, and run the command again; "
        "finished files are not downloaded twice.",
    )


def _refusal(error: Exception, repository: str, revision: str | None) -> CheckpointError | None:
    """Return what the hub answered about the repository; None if ``error`` is no such answer."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{repository} is gated on the hub, and you have no access yet.",
            next_step=f"Accept its licence at {page}, log in with `hf auth login`, and try again.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{repository} has no revision {revision!r} on the hub.",
            next_step=f"Choose one listed at {page}.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"There is no directory {repository!r}, and the hub has no such repository that you may read.",
            next_step=f"Check the name at {page}; log in with `hf auth login` if it is private.",
        )
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{repository!r} is no hub id: {error}.", next_step="Correct the name.")
    return None


def refuse_hazards(directory: Path, progress: Progress | None = None) -> None:
    """Refuse a checkpoint that asks to run code, or whose weights exist only as pickles.

    Pickles beside safetensors are never opened; they earn a remark.

    Raises:
        CheckpointError: a ``*.py`` file, an ``auto_map``, or pickles without safetensors; names the files.
        MachineError: the machine does not let us list the directory.
    """
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise unreadable(directory, error) from error
    code = [name for name in names if name.lower().endswith(".py")]
    configs = [path for name in _CONFIGS if (path := optional(directory, name, "the checkpoint")) is not None]
    asking = [path for path in configs if _has_key(read_json(path), "auto_map")]
    if code and not asking:
        raise CheckpointError(
            f"{directory} contains code ({listed(code)}), and code from a checkpoint is never run.",
            next_step=f"No configuration asks for it (auto_map), so the model does without: move {listed(code)} out of "
            "the directory, and run the command again.",
        )
    if code:
        raise _runs_code(f"{directory} contains code ({listed(code)})")
    if asking:
        raise _runs_code(f"{asking[0]} asks for code (auto_map)")
    pickles = [name for name in names if Path(name).suffix.lower() in _PICKLES]
    if not pickles:
        return
    if not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"The weights in {directory} are pickles ({listed(pickles)}), which can run code when read.",
            next_step="Convert them to safetensors, or download the checkpoint in that format.",
        )
    if progress is not None:
        progress.remark(f"Ignored in {directory}: {listed(pickles)}; only safetensors are read.")


def _runs_code(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}, and code from a checkpoint is never run.",
        next_step="Use the checkpoint of this model that transformers reads without trust_remote_code (for "
        "GLM-4 those named -hf or -0414), or remove the code and every auto_map if it does so already.",
    )


def _has_key(value: object, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_has_key(item, key) for item in value.values())
    return isinstance(value, list) and any(_has_key(item, key) for item in value)


