"""The demo checkpoint: a 15.7M parameter GLM-4 model that ships with the package."""

from importlib.resources import files
from pathlib import Path


def demo_checkpoint() -> Path:
    """Return the folder of the demo checkpoint, laid out like a checkpoint on the Hugging Face Hub."""
    folder = Path(str(files(__name__) / "checkpoint"))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the demo checkpoint is missing: {folder}")
    return folder
