"""A bundle on disk: its directory, what its manifest says, and everything that is read of it on the way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from glmexport.bundle.genai_config import GenaiConfig
from glmexport.bundle.links import loadable
from glmexport.bundle.loop import FixedLoopConfig, LoopConfig, read_loop
from glmexport.bundle.manifest import MANIFEST, Manifest, read_manifest, verify_files
from glmexport.bundle.names import MODEL, SCORING
from glmexport.foundation.errors import BundleError
from glmexport.foundation.files import sha256
from glmexport.foundation.host import Host
from glmexport.foundation.target import Target
from glmexport.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest has been read. No other file is read, and none is hashed, before it is asked for.

    Everything is read once: what was checked when the bundle was opened is what runs.
    """

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

    @property
    def target(self) -> Target:
        """The target that the bundle was built for."""
        return self.manifest.target

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the manifest's values, and so over every file that it lists."""
        return self.manifest.digest()

    @property
    def bytes(self) -> int:
        """The size of all files that the bundle consists of, its manifest included."""
        return sum(entry.size for entry in self.manifest.files) + self.path(MANIFEST).stat().st_size

    def path(self, name: str) -> Path:
        """Return where the file with that relative ``name`` is."""
        return self.directory / name

    @property
    def model(self) -> Path:
        """The graph that decodes."""
        return self.path(MODEL)

    @property
    def scoring(self) -> Path:
        """The graph that gives the logits of every position of a text."""
        return self.path(SCORING)

    @cached_property
    def loadable(self) -> Path:
        """The folder from which ONNX Runtime loads the bundle: its directory, unless the files there are links.

        Raises:
            MachineError: the files are links, and the cache that they lead to cannot be written to.
        """
        return loadable(self.directory)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer and the chat template of the bundle.

        Raises:
            CheckpointError: its files are missing, or are not what a tokenizer has.
        """
        return Tokenizer.open(self.directory)

    @cached_property
    def loop(self) -> LoopConfig | FixedLoopConfig | GenaiConfig:
        """The settings of the loop that runs the bundle: one of ours, or onnxruntime-genai's.

        Raises:
            BundleError: the file cannot be read, or is not what a build writes.
        """
        return read_loop(self.directory) or GenaiConfig.read(self.directory)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer.

        Raises:
            BundleError: the loop's file cannot be read, or is not what a build writes.
        """
        return self.loop.ends

    @property
    def context_length(self) -> int:
        """The number of tokens that the loop has room for, prompt and answer together.

        Raises:
            BundleError: the loop's file cannot be read, or is not what a build writes.
        """
        return self.loop.context_length

    @property
    def runs_here(self) -> bool:
        """Whether this machine has the execution provider of the bundle's target."""
        return self.target.provider.name in Host.this().providers

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
