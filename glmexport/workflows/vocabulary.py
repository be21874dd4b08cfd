"""The tokenizer beside a checkpoint, compared with the rows of its embedding and with the tokens that end an answer."""

from __future__ import annotations

from glmexport.architecture.description import Architecture
from glmexport.architecture.special_tokens import ending
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.errors import InputError
from glmexport.tokenizer.tokenizer import Tokenizer

#: Tokens for a row, at least. Tables are padded to multiples of 64 or 128 rows, and some rows are kept in reserve:
#: GLM-4 has 151,343 tokens for 151,552 rows, GLM-Edge 59,259 for 59,264. A tenth without a token is no padding.
_LEAST_SHARE = 0.9
_NEXT = (
    "Put the tokenizer files that belong to these weights into the directory: tokenizer.json, tokenizer_config.json "
    "and chat_template.jinja, all from one revision."
)


def refuse_tokenizer(checkpoint: Checkpoint, architecture: Architecture, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer of another model, whose texts these weights were not trained on.

    Raises:
        InputError: it has more tokens than the embedding has rows, or far fewer, or not every token that ends an
            answer.
    """
    rows, tokens = architecture.vocabulary_size, tokenizer.tokens
    if tokenizer.vocabulary_size > rows:
        raise InputError(
            f"{checkpoint.name}: the tokenizer has {tokenizer.vocabulary_size:,} tokens and the model {rows:,}.",
            next_step=_NEXT,
        )
    if tokens < _LEAST_SHARE * rows:
        raise InputError(
            f"{checkpoint.name}: the tokenizer has {tokens:,} tokens, {tokens / rows:.1%} of the {rows:,} that the "
            f"model has; below {_LEAST_SHARE:.0%} it is another model's.",
            next_step=_NEXT,
        )
    unknown = [token for token in architecture.eos_token_ids if not tokenizer.has(token)]
    if unknown:
        shown = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        raise InputError(
            f"{ending(checkpoint).where}: eos_token_id names {shown}, and the tokenizer has no such "
            f"{'token' if len(unknown) == 1 else 'tokens'}: it has {tokens:,}, to {tokenizer.vocabulary_size - 1:,}.",
            next_step=f"{_NEXT} If they do, correct eos_token_id.",
        )
