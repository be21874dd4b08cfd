"""A bundle becomes a release: its golden answers to the shipped text are recorded, and all of it is signed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glmexport.bundle.bundle import Bundle
from glmexport.calibration.corpus import Document, shipped_documents
from glmexport.foundation.progress import Progress
from glmexport.release.golden import GoldenText
from glmexport.release.keys import Signatory
from glmexport.release.signing import SignedRelease, sign

#: Golden answers at least; one of each language of the evaluation text.
_ANSWERS = 12


def sign_bundle(
    bundle: Bundle,
    signatory: Signatory,
    *,
    counter: int | None = None,
    force: bool = False,
    golden: bool = True,
    threads: int = 1,
    progress: Progress,
) -> SignedRelease:
    """Sign a bundle whose files are those of its manifest; a signing that fails leaves it as it was.

    Args:
        bundle: the bundle.
        signatory: who signs.
        counter: greater than that of the release that is there; None: seconds since 1970.
        force: take a counter that is not.
        golden: record what the bundle answers to the evaluation text, if it runs on this machine.
        threads: of the bundle while it answers.
        progress: who watches.

    Raises: what ``sign`` raises.
    """
    texts = golden_texts() if golden else None
    return sign(bundle, signatory, texts, counter=counter, force=force, threads=threads, progress=progress)


def golden_texts() -> list[GoldenText]:
    """Return the texts of which a release records the answers."""
    return [GoldenText(each.language, each.text) for each in _chosen(shipped_documents("evaluation"))]


def _chosen(documents: Sequence[Document]) -> Iterator[Document]:
    """Yield the first document of every language; where there are few languages, the second and so on, too."""
    by_language: dict[str, list[Document]] = {}
    for document in documents:
        by_language.setdefault(document.language, []).append(document)
    for index in range(-(-_ANSWERS // len(by_language))):
        yield from (same[index] for same in by_language.values() if index < len(same))
