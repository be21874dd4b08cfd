"""The way from a request to what the model is asked, and to how its answer is read."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from glmexport.chat.grammar import CALL, TAGS, THINK, THOUGHT, Grammar
from glmexport.engine.sampling import Sampling
from glmexport.foundation.errors import GlmexportError, InputError
from glmexport.serving.answer import Order
from glmexport.serving.failure import Refused
from glmexport.serving.fields import ChatRequest, CompletionRequest, TextRequest, read_body
from glmexport.serving.guides import Guide
from glmexport.serving.limits import ServingLimits
from glmexport.serving.messages import template_messages
from glmexport.serving.schemas import check_schema
from glmexport.serving.text import AnswerText, Decoder
from glmexport.tokenizer.control import Rendered
from glmexport.tokenizer.tokenizer import Tokenizer

#: Tokens of an answer to a text where the request says nothing, as OpenAI has it.
_TEXT_TOKENS = 16
_ANY_OBJECT = '{"type": "object"}'
#: The chat that a server reads for itself while it loads the bundle.
_FIRST_CHAT = b'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}'


@dataclass(frozen=True)
class RequestReader:
    """A reader of requests to one bundle.

    ``guides``: whether the bundle's loop can hold answers to a schema. ``lenient``: whether calls are repaired.
    """

    tokenizer: Tokenizer
    ends: frozenset[int]
    context_length: int
    limits: ServingLimits
    guides: bool
    lenient: bool

    def prepare(self) -> None:
        """Read a chat, so that the first one that is asked finds the process of chat templates, and all code, ready.

        What fails here fails for whoever asks, and is told then.
        """
        with suppress(GlmexportError, Refused):
            self.chat(read_body(_FIRST_CHAT, ChatRequest, self.limits))

    def chat(self, asked: ChatRequest) -> tuple[Order, Grammar]:
        """Return the order of a conversation, and what reads its answer.

        Raises:
            Refused: the conversation, or what is asked about it, cannot be answered.
        """
        if not self.tokenizer.has_chat_template:
            raise Refused(400, "This model has no chat template; ask /v1/completions.", "messages")
        if len(asked.tools) > self.limits.tools:
            raise Refused(400, f"At most {self.limits.tools} tools are taken.", "tools")
        if asked.top_logprobs > self.limits.top_logprobs or (asked.top_logprobs and not asked.logprobs):
            raise Refused(400, f"top_logprobs is at most {self.limits.top_logprobs}, with logprobs.", "top_logprobs")
        guide, opening = self._guide(asked), self._opening(asked)
        tools = [tool.model_dump(exclude_none=True) for tool in asked.tools] if asked.tool_choice != "none" else []
        settings: dict[str, object] = {"tools": tools} if tools else {}
        thinking = asked.chat_template_kwargs.enable_thinking
        if thinking is None and (guide or opening):
            # What the answer is held to, or begins with, has no place for reasoning.
            thinking = False
        if thinking is not None:
            settings["enable_thinking"] = thinking
        cleared = {asked.clear_thinking, asked.chat_template_kwargs.clear_thinking} - {None}
        if len(cleared) > 1:
            raise Refused(400, "clear_thinking differs from chat_template_kwargs.clear_thinking.", "clear_thinking")
        if cleared:
            settings["clear_thinking"] = cleared.pop()
        messages = template_messages(asked.messages, self.limits)
        try:
            prompt = self.tokenizer.render(messages, add_generation_prompt=True, **settings)
        except InputError as error:
            raise Refused(400, str(error), "messages") from error
        opened = self._opened(prompt)
        if opening:
            # The name is the client's, and the tags are not.
            prompt += self.tokenizer.written((THOUGHT if opened else "") + CALL) + opening.removeprefix(CALL)
            opened = False
        limit = asked.max_completion_tokens or asked.max_tokens
        if asked.max_completion_tokens and asked.max_tokens not in (None, asked.max_completion_tokens):
            raise Refused(400, "max_tokens and max_completion_tokens differ.", "max_tokens")
        top = asked.top_logprobs if asked.logprobs else None
        ids = self._encode(self.tokenizer.encode, prompt, "messages")
        order = self._order(asked, ids, limit or self.limits.answer_tokens, top, guide)
        reasons = self.tokenizer.template_mentions(THINK) and guide is None
        grammar = Grammar(tools or None, opened if reasons else None, lenient=self.lenient)
        # The answer begins in the prompt, so that nothing of it is certain yet.
        assert not grammar.feed(opening)
        return order, grammar

    def text(self, asked: TextRequest) -> Order:
        """Return the order of a text that is to be gone on with.

        Raises:
            Refused: it cannot be.
        """
        if asked.logprobs is not None and asked.logprobs > self.limits.top_logprobs:
            raise Refused(400, f"logprobs is at most {self.limits.top_logprobs}.", "logprobs")
        return self._order(asked, self._prompt(asked), asked.max_tokens or _TEXT_TOKENS, asked.logprobs, None)

    def decoding(self, order: Order, *, chat: bool) -> AnswerText:
        """Return what makes text of the answer to an order."""
        return AnswerText(Decoder(self.tokenizer, TAGS if chat else ()), order.stops)

    def spell(self, token: int) -> str:
        """Return the text of one token, special ones included."""
        return self.tokenizer.decode([token], skip_special=False)

    def _prompt(self, asked: TextRequest) -> list[int]:
        prompt = asked.prompt
        if isinstance(prompt, str):
            return self._encode(self.tokenizer.sequence, prompt, "prompt")
        if len(prompt) > self.context_length:
            raise self._too_long(len(prompt), "prompt")
        if any(not 0 <= token < self.tokenizer.vocabulary_size for token in prompt):
            raise Refused(400, f"Token ids are 0 to {self.tokenizer.vocabulary_size - 1}.", "prompt")
        return prompt

    def _opened(self, prompt: Rendered) -> bool:
        """Whether the template has begun the reasoning, which nobody else can."""
        end = prompt.rstrip()
        known = THINK in self.tokenizer.control_tokens
        return end.endswith(THINK) and (not known or (len(end) - len(THINK), len(end)) in end.control)

    def _encode(self, encode: Callable[[str], list[int]], text: str, param: str) -> list[int]:
        """Token ids of a text that may fit into the context; another one is not encoded at all.

        Raises:
            Refused: it is too long whatever its tokens are, no Unicode, or names a control token that cannot be text.
        """
        try:
            fewest = self.tokenizer.fewest_tokens(len(text.encode()))
        except UnicodeEncodeError as error:
            raise Refused(400, "A text has half of a surrogate pair.", param) from error
        if fewest > self.context_length:
            raise self._too_long(fewest, param)
        try:
            return encode(text)
        except InputError as error:
            raise Refused(400, str(error), param) from error

    def _too_long(self, tokens: int, param: str) -> Refused:
        return Refused(
            400, f"The prompt has {tokens} tokens or more and the context {self.context_length}.", param,
            "context_length_exceeded",
        )  # fmt: skip

    def _order(
        self, asked: CompletionRequest, prompt: Sequence[int], limit: int, top: int | None, guide: Guide | None
    ) -> Order:
        if limit > self.limits.answer_tokens:
            raise Refused(
                400, f"An answer has at most {self.limits.answer_tokens} tokens on this server.", "max_tokens"
            )
        if not prompt:
            raise Refused(400, "The prompt is empty.", "prompt")
        room = self.context_length - len(prompt)
        if room < 1:
            raise self._too_long(len(prompt), "messages" if isinstance(asked, ChatRequest) else "prompt")
        # A stop string that is a special token, which no text shows, is an end token.
        special = self.tokenizer.special_tokens
        stops = asked.stops(self.limits)
        return Order(
            prompt=tuple(prompt),
            max_tokens=min(limit, room),
            sampling=Sampling(
                asked.warmth, asked.top_p, secrets.randbits(63) if asked.seed is None else asked.seed % 2**64
            ),
            stops=tuple(stop for stop in stops if stop not in special),
            ends=self.ends | {special[stop] for stop in stops if stop in special},
            top=top,
            tells_end=isinstance(asked, TextRequest) and asked.return_token_ids,
            guide=guide,
        )

    def _opening(self, asked: ChatRequest) -> str:
        """Return the required beginning of an answer that is a call: a model that continues it is not free to talk.

        Raises:
            Refused: there is no such tool, or this model's grammar of calls is another one.
        """
        if isinstance(asked.tool_choice, str) and asked.tool_choice != "required":
            return ""
        name = "" if isinstance(asked.tool_choice, str) else asked.tool_choice.function.name
        names = {tool.function.name for tool in asked.tools}
        if not names or (name and name not in names):
            raise Refused(400, "tool_choice asks for a tool that tools does not have.", "tool_choice")
        if any(tag in name for tag in TAGS):
            raise Refused(400, "tool_choice asks for a tool with a tag of calls in its name.", "tool_choice")
        if not self.tokenizer.template_mentions(CALL):
            raise Refused(
                400, f"This model's template writes no {CALL}, so that no call can be asked for.", "tool_choice",
                "unsupported_value",
            )  # fmt: skip
        return CALL + name

    def _guide(self, asked: ChatRequest) -> Guide | None:
        """Return the grammar that the answer must follow, if one is asked for."""
        form = asked.response_format
        if form is None or form.type == "text":
            return None
        if not self.guides:
            raise Refused(
                400, "Answers cannot be held to JSON here: onnxruntime-genai, which can, does not run this bundle.",
                "response_format", "unsupported_value",
            )  # fmt: skip
        if asked.tools and asked.tool_choice != "none":
            raise Refused(400, "An answer is either held to JSON or may call tools.", "response_format")
        if asked.chat_template_kwargs.enable_thinking:
            raise Refused(400, "An answer that is held to JSON has no reasoning.", "chat_template_kwargs")
        if form.json_schema is None:
            return Guide("json_schema", _ANY_OBJECT)
        check_schema(form.json_schema.schema_, "response_format")
        return Guide("json_schema", json.dumps(form.json_schema.schema_))
