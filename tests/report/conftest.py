from __future__ import annotations

from collections.abc import Callable

import pytest
from sample_report import make_report

from glmexport.report.document import Report


@pytest.fixture
def report() -> Report:
    return make_report(layers=3)


@pytest.fixture
def changed(report: Report) -> Callable[..., Report]:
    """The report with some keys exchanged, checked again."""
    return lambda **keys: Report.model_validate({**dict(report), **keys})
