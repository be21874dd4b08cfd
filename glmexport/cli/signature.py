"""Treatment of the reports of bundles that may be signed, shared by several verbs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glmexport.cli.console import Terminal


@contextmanager
def telling_of_signature(terminal: Terminal, directory: Path) -> Iterator[None]:
    """Say so if what is done within changes the report of a bundle under a signature, which covers it."""
    from glmexport.bundle.manifest import REPORTS, SIGNATURE
    from glmexport.foundation.files import sha256

    def reports() -> dict[str, str]:
        return {name: sha256(directory / name) for name in sorted(REPORTS) if (directory / name).is_file()}

    signed = (directory / SIGNATURE).is_file()
    before = reports() if signed else {}
    yield
    if signed and reports() != before:
        terminal.remark(f"The report in {directory} changed, so its signature no longer holds; sign it again.")


def signed_report_path(path: Path) -> Path:
    """Return the path of a report, which in a signed bundle has to be the one that was signed.

    Raises:
        UnverifiedError: ``path`` is a signed bundle, and its report is another one.
    """
    from glmexport.release.opening import check_signed_file
    from glmexport.report.document import report_path

    report = report_path(path)
    if path.is_dir():
        check_signed_file(report)
    return report
