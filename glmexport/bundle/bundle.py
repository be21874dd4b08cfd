"""A bundle on disk: its directory, what its manifest says, and everything that is read of it on the way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.loop import FixedLoopConfig, LoopConfig, read_loop
from glmexport.bundle.manifest import Manifest, read_manifest, verify_files
from glmexport.foundation.errors import BundleError
from glmexport.foundation.files import sha256
from glmexport.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Bundle:
    """A bundle, of which the manifest has been read and no other file has been hashed."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: Path) -> Bundle:
        """Read the manifest of the bundle in ``directory``.

        Raises:
            BundleError: there is no bundle, or its manifest is of another version.
        """
        return cls(directory, read_manifest(directory))

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.directory.name

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer and the chat template of the bundle.

        Raises:
            CheckpointError: its files are missing, or are not what a tokenizer has.
        """
        return Tokenizer.open(self.directory)

    @cached_property
    def loop(self) -> LoopConfig | FixedLoopConfig | GenaiConfig:
        """What the loop that runs the bundle reads.

        Raises:
            BundleError: the file cannot be read, or is not what a build writes.
        """
        return read_loop(self.directory) or GenaiConfig.read(self.directory)

    def verify(self) -> None:
        """Compare every file of the bundle with the manifest.

        Raises:
            BundleError: names the first file that is missing, changed, linked to elsewhere or additional.
        """
        verify_files(self.directory, self.manifest)

    def require_file(self, name: str) -> None:
        """Compare one file with the manifest, for what has to be known of it before all of them are read.

        Raises:
            BundleError: it is not the one that the manifest lists.
        """
        listed = {entry.path: entry for entry in self.manifest.files}
        path = self.directory / name
        if name not in listed or not path.is_file() or sha256(path) != listed[name].sha256:
            # Which of the two it is, and what to do about it, is for the check of all files to say.
            self.verify()
            raise BundleError(
                f"{path} is not in the bundle's manifest.", next_step="Copy the bundle again, or build it again."
            )
