"""The demo checkpoint: a 15.7M parameter GLM-4 model, beside this file in a checkout, else its own distribution."""

from importlib.metadata import distribution
from pathlib import Path


def demo_checkpoint() -> Path:
    """Return the folder of the demo checkpoint, laid out like a checkpoint on the Hugging Face Hub.

    Raises:
        ImportError: neither is this a checkout, nor is the distribution ``glmexport-demo`` installed.
    """
    folder = Path(__file__).with_name("checkpoint")
    if folder.is_dir():
        return folder
    return Path(str(distribution("glmexport-demo").locate_file("glmexport_demo/checkpoint")))
