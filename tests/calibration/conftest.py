"""A byte-level tokenizer with GLM's prefix, and one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import write_tokenizer

from glmexport.tokenizer.tokenizer import Tokenizer


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.open(directory)
