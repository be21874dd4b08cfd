"""Answers in turns: the tokens of the loop alone, whoever else has turns, guessed or not; and what ends them."""

from __future__ import annotations

from pathlib import Path

import pytest
from builds import THREADS

from glmexport.bundle.bundle import Bundle
from glmexport.engine.core.sequence import Engine
from glmexport.engine.generation import GenerationSession
from glmexport.engine.sampling import Sampling
from glmexport.serving.answer import End, Event, FreeTurns, Order, PendingAnswer
from glmexport.serving.text import AnswerText, Decoder, TextPart, Token
from glmexport.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.open(directory)


def prompt_of(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True))


def begun(engine: Engine, tokenizer: Tokenizer, order: Order, guesses: int = 0) -> tuple[FreeTurns, list[Event]]:
    told: list[Event] = []
    answer = PendingAnswer(order, AnswerText(Decoder(tokenizer), order.stops), told.append, lambda _: None)
    sequence = engine.begin(len(order.prompt) + order.max_tokens)
    return FreeTurns(answer, sequence, engine.chunk, guesses), told


def all_of(engine: Engine, tokenizer: Tokenizer, order: Order, guesses: int = 0) -> tuple[list[Token], FreeTurns]:
    turns, told = begun(engine, tokenizer, order, guesses)
    while (reason := turns.turn()) is None:
        pass
    turns.answer.end(reason)
    assert isinstance(told[-1], End) and told[-1].tokens == len(turns.answer.tokens)
    return [token for part in told if isinstance(part, TextPart) for token in part.tokens], turns


@pytest.mark.parametrize("text", ["Hi!", "Hello", "Endless~", "x" * 700])
def test_greedy_tokens_are_those_of_the_loop(engine: Engine, directory: Path, tokenizer: Tokenizer, text: str) -> None:
    prompt = prompt_of(tokenizer, text)
    session = GenerationSession.open(Bundle.open(directory), THREADS)
    expected = [token for token in session.tokens(prompt, 40) if token not in engine.ends]
    tokens, _ = all_of(engine, tokenizer, Order(prompt, 40, Sampling(0), ends=engine.ends))
    assert [token.id for token in tokens] == expected


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, 0.95, seed=11)], ids=["greedy", "sampled"])
def test_guesses_change_no_answer(engine: Engine, tokenizer: Tokenizer, sampling: Sampling) -> None:
    accepted = 0
    for text in ("Endless~", "Hello, hello, hello, hello", "a b a b a b a b "):
        order = Order(prompt_of(tokenizer, text), 60, sampling, ends=engine.ends, top=1)
        plain, _ = all_of(engine, tokenizer, order)
        guessed, turns = all_of(engine, tokenizer, order, guesses=8)
        assert [token.id for token in guessed] == [token.id for token in plain]
        for mine, other in zip(guessed, plain, strict=True):
            assert mine.likely and other.likely
            assert mine.likely.logprob == pytest.approx(other.likely.logprob, abs=1e-3)
        accepted += turns.accepted
        # What was guessed wrong, and what came behind the end, is taken back.
        assert len(turns.sequence.tokens) == len(order.prompt) + len(turns.answer.tokens) - 1 + _ended(turns)
    assert accepted > 20


def _ended(turns: FreeTurns) -> bool:
    """Whether an end token, which is no token of the answer, ended it."""
    return len(turns.answer.tokens) < turns.answer.order.max_tokens


def test_others_in_between_change_no_answer(engine: Engine, tokenizer: Tokenizer) -> None:
    orders = [
        Order(prompt_of(tokenizer, text), 20, Sampling(1.0, 1.0, seed=at), ends=engine.ends)
        for at, text in enumerate(["Hello", "Hi!", "x" * 300, "Endless~"])
    ]
    alone = [[token.id for token in all_of(engine, tokenizer, order)[0]] for order in orders]
    running = [begun(engine, tokenizer, order)[0] for order in orders]
    left = list(running)
    while left:
        left = [turns for turns in left if turns.turn() is None]
    assert [turns.answer.tokens for turns in running] == alone


def test_the_context_s_end_ends_an_answer(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = prompt_of(tokenizer, "Endless~")
    prompt = (*prompt[:2] * ((engine.context_length - len(prompt)) // 2 - 5), *prompt)
    room = engine.context_length - len(prompt)
    tokens, turns = all_of(engine, tokenizer, Order(prompt, room, Sampling(0), ends=engine.ends), guesses=8)
    assert len(tokens) == room and len(turns.sequence.tokens) <= engine.context_length
