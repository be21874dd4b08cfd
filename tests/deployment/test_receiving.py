"""An order names each file with a SHA-256 and a size."""

from __future__ import annotations

from typing import Any

import pytest

from glmexport.wire.server.receiving import checked_files
from glmexport.wire.standalone import Failure

FILE = {"path": "model.onnx", "sha256": "0" * 64, "size": 1}


def test_a_file_with_a_digest_and_a_size_is_taken() -> None:
    assert checked_files({"files": [FILE]}) == [FILE]


@pytest.mark.parametrize(
    "digest",
    [int("1" * 64), "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", " " + "0" * 63, "sha256:" + "0" * 64, "", None],
)
def test_a_digest_is_spelled_in_one_way(digest: Any) -> None:
    with pytest.raises(Failure, match="SHA-256"):
        checked_files({"files": [FILE | {"sha256": digest}]})


@pytest.mark.parametrize("size", [-1, 1.0, "1", True, None])
def test_a_size_is_a_number_of_bytes(size: Any) -> None:
    with pytest.raises(Failure, match="size"):
        checked_files({"files": [FILE | {"size": size}]})
