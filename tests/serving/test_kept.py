"""What earlier requests computed is gone on with where it saves something, and then to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from glmexport.engine.core.sequence import Engine, Sequence
from glmexport.engine.kept import Kept, room_for
from glmexport.engine.sampling import Sampling
from glmexport.serving.answer import End, FreeTurns, Order, PendingAnswer
from glmexport.serving.text import AnswerText, Decoder, TextPart, Token
from glmexport.tokenizer.tokenizer import Tokenizer

RANDOM = np.random.default_rng(0)
LONG = RANDOM.integers(0, 250, 700).tolist()


def answered(
    engine: Engine, directory: Path, prompt: list[int], sequence: Sequence | None
) -> tuple[list[Token], Sequence]:
    """Tokens with the likelihoods of all, and the sequence behind them."""
    order = Order(tuple(prompt), 12, Sampling(0), top=512)
    text, told = AnswerText(Decoder(Tokenizer.open(directory)), ()), list[TextPart | End]()
    answer = PendingAnswer(order, text, told.append, lambda _: None)  # type: ignore[arg-type]
    turns = FreeTurns(answer, sequence or engine.begin(room_for(len(prompt) + 12, engine.context_length)), engine.chunk)
    while turns.turn() is None:
        pass
    return [token for part in told if isinstance(part, TextPart) for token in part.tokens], turns.sequence


def test_an_answer_is_the_same_to_the_bit(engine: Engine, directory: Path) -> None:
    first = LONG[:600]
    tokens, sequence = answered(engine, directory, first, None)
    assert sequence.whole == 512
    # A next turn: the same beginning, the answer, and more.
    following = [*first, *(token.id for token in tokens), *LONG[600:640]]
    anew, _ = answered(engine, directory, following, None)
    kept = Kept(engine.chunk)
    kept.keep(sequence, None)
    taken = kept.take(following, 1000, None)
    assert taken is sequence and len(taken.tokens) == 512 and len(kept) == 0
    again, _ = answered(engine, directory, following, taken)
    assert again == anew and len(anew) == 12


def test_what_does_not_pay_is_left(engine: Engine, directory: Path) -> None:
    _, sequence = answered(engine, directory, LONG, None)
    kept = Kept(engine.chunk)
    kept.keep(sequence, None)
    other = RANDOM.integers(0, 250, 400).tolist()
    for prompt in (other, LONG[:200], LONG[:256], [*LONG[:255], 1, 2]):
        assert kept.take(prompt, 500, None) is None
    assert kept.take(LONG, sequence.capacity + 1, None) is None
    assert len(kept) == 1 and len(sequence.tokens) >= 700
    # The same prompt again: what its last token gives has to be computed.
    assert kept.take(LONG[:513], 600, None) is sequence and len(sequence.tokens) == 512


def test_a_beginning_that_many_share_costs_no_conversation_its_own(engine: Engine, directory: Path) -> None:
    long = (LONG * 2)[:1300]
    _, sequence = answered(engine, directory, long, None) if engine.context_length > 1400 else (None, None)
    kept = Kept(engine.chunk)
    assert sequence
    kept.keep(sequence, None)
    assert kept.take([*long[:300], *LONG[:200]], 600, None) is None


def test_only_the_last_ones_are_kept(engine: Engine, directory: Path) -> None:
    kept, made = Kept(engine.chunk), []
    for start in range(3):
        _, sequence = answered(engine, directory, LONG[start : start + 300], None)
        made.append(sequence)
        kept.keep(sequence, None)
    kept.drop(2)
    assert len(kept) == 2 and kept.take(LONG[:300], 400, None) is None
    assert kept.take(LONG[2:302], 400, None) is made[2]
    kept.keep(engine.begin(100), None)
    assert len(kept) == 1


def test_what_another_key_asked_is_not_gone_on_with(engine: Engine, directory: Path) -> None:
    kept = Kept(engine.chunk)
    for key in (0, None):
        _, sequence = answered(engine, directory, LONG, None)
        kept.keep(sequence, key)
        for other in {0, 1, None} - {key}:
            assert kept.take(LONG, 750, other) is None
        assert kept.take(LONG, 750, key) is sequence and len(kept) == 0
