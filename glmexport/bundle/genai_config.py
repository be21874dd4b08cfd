"""The file genai_config.json, read strictly: onnxruntime-genai does whatever it says.

A bundle could name a library to load in it, a file to write or a graph elsewhere. So only the content that a build
writes is allowed: no other key, no other graph, and for the session only the settings that a target may have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from glmexport.bundle.links import loadable
from glmexport.bundle.names import GENAI_CONFIG, INPUTS, OUTPUTS
from glmexport.foundation.definition import Definition, Size, TokenId, first_problem
from glmexport.foundation.errors import BundleError
from glmexport.foundation.session_settings import check_provider, check_session_entries
from glmexport.foundation.target import Target
from glmexport.foundation.untrusted import SMALL, parse_object, read_regular

#: Number of prompt tokens whose activations are in memory together, so that they do not grow with its length.
PREFILL_TOKENS = 256


class _Decoder(Definition):
    filename: Literal["model.onnx"]
    session_options: dict[str, Any]
    hidden_size: Size
    head_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    num_hidden_layers: Size
    inputs: dict[str, str]
    outputs: dict[str, str]


class _Model(Definition):
    type: Literal["decoder"]
    context_length: Size
    vocab_size: Size
    bos_token_id: TokenId
    eos_token_id: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=64)]
    pad_token_id: TokenId
    decoder: _Decoder

    @model_validator(mode="after")
    def _every_id_is_a_token(self) -> Self:
        for token in (self.bos_token_id, *self.eos_token_id, self.pad_token_id):
            if token >= self.vocab_size:
                raise ValueError(f"token {token} is none of {self.vocab_size}")
        return self


class _Search(Definition):
    do_sample: Literal[False]
    max_length: Size
    min_length: Literal[0]
    num_beams: Literal[1]
    num_return_sequences: Literal[1]
    past_present_share_buffer: bool
    repetition_penalty: Literal[1]
    temperature: Literal[1]
    top_k: Literal[1]
    top_p: Literal[1]


class _Document(Definition):
    model: _Model
    search: _Search


@dataclass(frozen=True)
class GenaiConfig:
    """The facts in a bundle's genai_config.json that the loops here go by."""

    ends: frozenset[int]
    context_length: int
    vocabulary_size: int
    #: The execution providers that the file asks for; none: the CPU's.
    providers: tuple[str, ...]
    #: The options that onnxruntime-genai gives the session, as they are in the file.
    session_options: dict[str, Any]

    @classmethod
    def read(cls, bundle: Path) -> GenaiConfig:
        """Read the file of a bundle, which may have only what a build writes.

        Raises:
            BundleError: the file is missing, or is another one than a build writes.
        """
        path = bundle / GENAI_CONFIG
        try:
            written = read_regular(path, SMALL.size)
            document = parse_object(written, SMALL)
            model = _Document.model_validate(document).model
            expected = (json.dumps(document, indent=2) + "\n").encode()
            _require(written == expected, "it is not spelled as a build writes it")
            _require((model.decoder.inputs, model.decoder.outputs) == (INPUTS, OUTPUTS), "it names other inputs")
            options = model.decoder.session_options
            providers = tuple(_checked(options))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{path} cannot be used: {_reason(error)}.",
                next_step="Build the bundle again, or copy it again from where it was built.",
            ) from error
        return cls(
            ends=frozenset(model.eos_token_id),
            context_length=model.context_length,
            vocabulary_size=model.vocab_size,
            providers=providers,
            session_options=options,
        )

    @property
    def chunk(self) -> int | None:
        """The number of prompt positions that are computed together; None, on an accelerator: all of them.

        It is not in the bundle, since onnxruntime-genai takes several prompts together in one piece only.
        """
        return None if self.providers else PREFILL_TOKENS


def genai_settings(bundle: Path, threads: int, profile: Path | None = None) -> Any:
    """Return onnxruntime-genai's ``Config`` of a bundle, the only way in which one is made here.

    ``profile`` begins the name of a profile of the session, which is written when the model is freed.

    Raises:
        BundleError: genai_config.json is not what a build writes.
    """
    import onnxruntime_genai

    GenaiConfig.read(bundle)
    settings = onnxruntime_genai.Config(str(loadable(bundle)))
    options: dict[str, Any] = {"intra_op_num_threads": threads}
    if profile:
        options["enable_profiling"] = str(profile)
    settings.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return settings


def session_options(target: Target) -> dict[str, Any]:
    """Return the options that onnxruntime-genai gives the session of a bundle for ``target``."""
    provider, session = target.provider, target.session
    return {
        "log_id": "glmexport",
        **({"intra_op_num_threads": session.threads} if session.threads else {}),
        # onnxruntime-genai hands on names that it does not know as configuration entries.
        **session.config,
        "provider_options": (
            [] if provider.name == "CPUExecutionProvider" else [{provider.name: dict(provider.options)}]
        ),
    }


def _checked(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the execution providers in the options of a session, which may have only what a target may have."""
    plain = {"log_id", "intra_op_num_threads", "provider_options"}
    _require(options.get("log_id") == "glmexport", "its log_id is another one")
    _require(type(options.get("intra_op_num_threads", 1)) is int, "its intra_op_num_threads is no number")
    check_session_entries(_texts({name: value for name, value in options.items() if name not in plain}))
    for each in options.get("provider_options", []):
        for name, chosen in each.items():
            check_provider(name, _texts(chosen))
            yield name


def _texts(settings: Mapping[str, Any]) -> Mapping[str, str]:
    for name, value in settings.items():
        _require(isinstance(value, str), f"{name!r} may not be {value!r}")
    return settings


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return first_problem(error)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": .")
