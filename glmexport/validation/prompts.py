"""Prompt parity: a bundle's tokenizer and chat template turn conversations into the token ids that the original's do.

A template that was swapped, or a tokenizer that lost a special token, leaves every weight as it was and makes another
model of them. transformers is the reference: its tokenizer, opened from the checkpoint. It takes the names of control
tokens in a message for the tokens, which nothing here does: of such conversations the reference is what is made of them
with the checkpoint's own files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from glmexport.calibration.corpus import Document
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.foundation.definition import Definition
from glmexport.foundation.errors import CheckpointError
from glmexport.results.prompts import PromptDifference, PromptParity
from glmexport.tokenizer.tokenizer import Tokenizer
from glmexport.validation.texts import EvaluationSet

_LONGEST = 160
#: Tokens shown before and behind the first difference.
_CONTEXT = 6
_TOOL = {
    "type": "function",
    "function": {
        "name": "lookup_dosage",
        "description": "Daily dose of a drug.",
        "parameters": {
            "type": "object",
            "properties": {"drug": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["drug"],
        },
    },
}


class Conversation(Definition):
    """Messages, and what else the template is given."""

    name: str
    language: str
    messages: list[dict[str, Any]]
    variables: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool = True


class GoldenPrompt(Definition):
    """A conversation, and what is made of it with the original's tokenizer."""

    conversation: Conversation
    #: None if the template refuses.
    ids: list[int] | None
    refusal: str = ""


def golden_conversations(documents: Sequence[Document]) -> Iterator[Conversation]:
    """Of every language, with words from its first document: single and several turns, tools, thinking on and off."""
    for language in dict.fromkeys(document.language for document in documents):
        text = next(document.text for document in documents if document.language == language)[:_LONGEST]
        half = len(text) // 2
        user: dict[str, Any] = {"role": "user", "content": text}
        turns: list[dict[str, Any]] = [
            {"role": "system", "content": text[:half]},
            {"role": "user", "content": text[half:]},
            {"role": "assistant", "content": text},
            user,
        ]
        call = {"type": "function", "function": {"name": "lookup_dosage", "arguments": {"drug": text[:12], "age": 7}}}
        answered: list[dict[str, Any]] = [
            user,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": text[:half]},
        ]
        yield Conversation(name="one turn", language=language, messages=[user])
        yield Conversation(name="several turns", language=language, messages=turns)
        yield Conversation(name="to its end", language=language, messages=turns[:3], add_generation_prompt=False)
        yield Conversation(name="tools", language=language, messages=answered, variables={"tools": [_TOOL]})
        yield Conversation(name="thinking", language=language, messages=turns, variables={"enable_thinking": True})
        yield Conversation(name="no thinking", language=language, messages=turns, variables={"enable_thinking": False})
        yield Conversation(
            name="special tokens in the text",
            language=language,
            messages=[{**user, "content": f"<|user|>[gMASK]{text}</s>"}],
        )


def golden_prompts(checkpoint: Checkpoint, evaluation: EvaluationSet) -> list[GoldenPrompt] | str | None:
    """Return the golden conversations as the original's tokens; None without a chat template.

    A string says why transformers cannot open the tokenizer: whatever it is, hours of work must not be lost to it.
    """
    from transformers import AutoTokenizer

    try:
        original = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not original.chat_template:
        return None

    def expected(conversation: Conversation) -> list[int]:
        ids: list[int] = original.apply_chat_template(
            conversation.messages,
            add_generation_prompt=conversation.add_generation_prompt,
            return_dict=False,
            **conversation.variables,
        )
        return ids

    own, prompts = evaluation.tokenizer, []
    for conversation in golden_conversations(evaluation.documents):
        ids = _ids(partial(_given, own) if own.names_control(conversation.messages) else expected, conversation)
        refused = isinstance(ids, str)
        prompts.append(
            GoldenPrompt(
                conversation=conversation, ids=None if refused else ids, refusal=ids if isinstance(ids, str) else ""
            )
        )
    return prompts


def prompt_parity(golden: Sequence[GoldenPrompt] | str | None, bundle: Tokenizer) -> PromptParity | None:
    """Compare the bundle's tokenizer and template with ``golden``; None where the original has no chat template."""
    if golden is None:
        return None
    if isinstance(golden, str):
        return PromptParity(compared=0, refused=0, differences=(), unopened=golden)

    compared, refused, differences = 0, 0, []
    for prompt in golden:
        conversation = prompt.conversation
        theirs = prompt.refusal if prompt.ids is None else prompt.ids
        ours = _ids(partial(_given, bundle), conversation)
        if isinstance(theirs, str) and isinstance(ours, str):
            # A kind of conversation that the template does not admit.
            refused += 1
            continue
        compared += 1
        if theirs != ours:
            before, after = _around(bundle, theirs, ours)
            differences.append(
                PromptDifference(
                    conversation=conversation.name, language=conversation.language, expected=before, given=after
                )
            )
    return PromptParity(compared=compared, refused=refused, differences=tuple(differences))


def _given(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    return tokenizer.encode_chat(
        conversation.messages, add_generation_prompt=conversation.add_generation_prompt, **conversation.variables
    )


def _ids(encode: Callable[[Conversation], list[int]], conversation: Conversation) -> list[int] | str:
    """Token ids, or the template's reason to refuse."""
    try:
        return encode(conversation)
    except CheckpointError as error:
        return error.message
    except MemoryError:
        raise
    except Exception as error:
        # The template is a program of the checkpoint's, and transformers lets out whatever it raises.
        return f"{type(error).__name__}: {error}"


def _around(tokenizer: Tokenizer, theirs: list[int] | str, ours: list[int] | str) -> tuple[str, str]:
    """The two where they first differ."""
    if isinstance(theirs, str) or isinstance(ours, str):
        return theirs if isinstance(theirs, str) else "accepted", ours if isinstance(ours, str) else "accepted"
    pairs = zip(theirs, ours, strict=False)
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(ours)))
    span = slice(max(0, first - _CONTEXT), first + _CONTEXT)
    return tokenizer.decode(theirs[span], skip_special=False), tokenizer.decode(ours[span], skip_special=False)
