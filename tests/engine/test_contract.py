"""Every kind of engine keeps the same promises about its sequences."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builds import THREADS, small_checkpoint, write_fixed_target
from predicting import PREDICTING, Predicting, enliven, write_unvalidated

from glmexport.bundle.bundle import Bundle
from glmexport.bundle.names import ATTENTION_MASK, INPUT_IDS, LOGITS, MODEL, RECENT_LOGITS, SHORT_STEP
from glmexport.engine.core.cache import cache_specs
from glmexport.engine.core.graph_engine import EngineLimits, GraphEngine
from glmexport.engine.core.graphs import GraphNames, MaskedGraph
from glmexport.engine.core.greedy import greedy
from glmexport.engine.core.sequence import Engine, Sequence
from glmexport.engine.generation import GenerationSession
from glmexport.engine.opening import open_engine
from glmexport.engine.session import open_session
from glmexport.engine.speculation import Speculation, speculate

CONTEXT, CHUNK = 600, 16
IDS = np.random.default_rng(0).integers(0, 250, CONTEXT).tolist()
#: Several positions are added up in another order than one.
ROUNDING = 1e-4
KINDS = ("genai", "batched", "growing", "latent", "predicting", "fixed")


def growing(bundle: Bundle) -> Engine:
    """The engine of a device: the graph gives its caches back longer."""
    session = open_session(bundle.directory / MODEL, bundle.manifest.target.provider, THREADS)
    outputs = {
        value.name: value.name.replace("past_key_values", "present")
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    names = GraphNames(INPUT_IDS, ATTENTION_MASK, LOGITS, cache_specs(session, outputs), RECENT_LOGITS)
    return GraphEngine(MaskedGraph(session, names), EngineLimits(bundle.loop.ends, CONTEXT, SHORT_STEP))


@dataclass(frozen=True)
class Case:
    """One kind of engine and the bundle in it."""

    bundle: Bundle
    engine: Engine


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    base = tmp_path_factory.mktemp("contract")
    settings: dict[str, Any] = {"max_position_embeddings": CONTEXT, "eos_token_id": [256]}
    small_checkpoint(base / "heads.checkpoint", **settings)
    family, changes = PREDICTING["glm4_moe_lite"]
    Predicting(base / "latent.checkpoint", family, **changes, **settings)
    for name in ("heads", "latent"):
        enliven(base / f"{name}.checkpoint")
    targets = {"heads": "x86-avx2", "latent": "x86-avx2", "fixed": str(write_fixed_target(base, CHUNK, 96))}
    return {
        name: Bundle.open(
            write_unvalidated(base / f"{name.replace('fixed', 'heads')}.checkpoint", base / name, target)
        )
        for name, target in targets.items()
    }


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, bundles: dict[str, Bundle]) -> Case:
    mtp = Speculation("mtp", 1)
    name, opened = {
        "genai": ("heads", lambda bundle: open_engine(bundle, THREADS)),
        "batched": ("heads", lambda bundle: open_engine(bundle, THREADS, batch=3)),
        "growing": ("heads", growing),
        "latent": ("latent", lambda bundle: open_engine(bundle, THREADS)),
        "predicting": ("latent", lambda bundle: open_engine(bundle, THREADS, speculation=mtp)),
        "fixed": ("fixed", lambda bundle: open_engine(bundle, THREADS)),
    }[request.param]
    return Case(bundles[name], opened(bundles[name]))


@pytest.fixture
def engine(case: Case) -> Engine:
    return case.engine


def behind(engine: Engine, ids: list[int]) -> np.ndarray:
    """Logits behind a fresh sequence of ``ids``, computed at once."""
    with closing(engine.begin(len(ids))) as sequence:
        return sequence.advance(ids)


def in_pieces(sequence: Sequence, ids: list[int], sizes: tuple[int, ...]) -> np.ndarray:
    start = 0
    for size in sizes:
        logits = sequence.advance(ids[start : start + size])
        start += size
    assert start == len(ids)
    return logits


def test_it_says_what_it_is(case: Case) -> None:
    engine = case.engine
    assert (engine.ends, engine.context_length) == (case.bundle.loop.ends, case.bundle.loop.context_length)
    assert engine.label.startswith("onnxruntime") and engine.short_step >= 1
    assert engine.chunk is not None and 1 < engine.chunk < engine.context_length


@pytest.mark.parametrize("sizes", [(20, 1, 19), (1, 39), (5, 1, 1, 33), (1,) * 40], ids=str)
def test_pieces_are_the_whole(engine: Engine, sizes: tuple[int, ...]) -> None:
    whole = behind(engine, IDS[:40])
    assert whole.shape[0] == 1 and whole.dtype == np.float32
    with closing(engine.begin(40)) as sequence:
        pieces = in_pieces(sequence, IDS[:40], sizes)
        assert sequence.tokens == IDS[:40]
    assert np.abs(pieces - whole).max() < ROUNDING


def test_to_the_last_position_of_the_context(engine: Engine) -> None:
    """Past the growth of every cache; the logits of another way to cut the text are the same."""
    length = engine.context_length
    assert engine.chunk
    with closing(engine.begin(length)) as one, closing(engine.begin(length)) as other:
        for start in range(0, length - 1, engine.chunk):
            one.advance(IDS[start : min(start + engine.chunk, length - 1)])
        for start in range(0, length - 1, 13):
            other.advance(IDS[start : min(start + 13, length - 1)])
        last = [sequence.advance([IDS[length - 1]]) for sequence in (one, other)]
        assert np.abs(last[0] - last[1]).max() < ROUNDING
        for sequence in (one, other):
            assert len(sequence.tokens) == length == sequence.capacity
            with pytest.raises(ValueError, match=f"room for {length} tokens"):
                sequence.advance([1])


def test_a_capacity_is_not_passed(engine: Engine) -> None:
    with closing(engine.begin(30)) as sequence:
        assert sequence.capacity >= 30
        with pytest.raises(ValueError, match="there is room for"):
            sequence.advance([1] * (sequence.capacity + 1))
        # Nothing of it was computed.
        assert sequence.tokens == []
        assert np.array_equal(sequence.advance(IDS[:30]), behind(engine, IDS[:30]))


@pytest.mark.parametrize("kept", [0, 1, 7, 29])
def test_what_was_forgotten_leaves_no_trace(engine: Engine, kept: int) -> None:
    with closing(engine.begin(60)) as sequence:
        sequence.advance(IDS[:kept] + IDS[100:130] if kept else IDS[100:130])
        sequence.advance([5])
        sequence.forget(31)
        assert sequence.tokens == IDS[:kept]
        given = sequence.advance(IDS[kept:40])
        assert sequence.tokens == IDS[:40]
    with closing(engine.begin(60)) as fresh:
        if kept:
            fresh.advance(IDS[:kept])
        assert np.abs(given - fresh.advance(IDS[kept:40])).max() < ROUNDING


def test_a_short_step_gives_the_logits_of_single_steps(engine: Engine) -> None:
    count = engine.short_step
    with closing(engine.begin(60)) as one, closing(engine.begin(60)) as other:
        for sequence in (one, other):
            sequence.advance(IDS[:20])
        rows = one.advance(IDS[20 : 20 + count], every=True)
        assert rows.shape[0] == count
        singles = np.concatenate([other.advance([token]) for token in IDS[20 : 20 + count]])
        assert np.abs(rows - singles).max() < ROUNDING
        assert one.tokens == other.tokens == IDS[: 20 + count]
        with pytest.raises(ValueError, match=f"a short step has {count} tokens"):
            one.advance([1] * (count + 1), every=True)


def test_whole_pieces_are_counted(engine: Engine) -> None:
    chunk = engine.chunk
    assert chunk
    with closing(engine.begin(2 * chunk + 10)) as sequence:
        wholes = []
        for size in (chunk, chunk, 5, 5):
            sequence.advance(IDS[:size])
            wholes.append(sequence.whole)
        assert wholes == [chunk, 2 * chunk, 2 * chunk, 2 * chunk]
        sequence.forget(10)
        assert sequence.whole == 2 * chunk
        sequence.forget(1)
        assert sequence.whole == chunk
    with closing(engine.begin(chunk + 1)) as sequence:
        sequence.advance([1])
        sequence.advance(IDS[:chunk])
        assert sequence.whole == 0


def test_what_makes_no_sense_is_refused(engine: Engine) -> None:
    with closing(engine.begin(20)) as sequence:
        sequence.advance(IDS[:5])
        for wrong in (lambda: sequence.advance([]), lambda: sequence.forget(6), lambda: sequence.forget(-1)):
            with pytest.raises(ValueError, match="tokens to"):
                wrong()
        sequence.forget(0)
        assert sequence.tokens == IDS[:5]


def test_close_is_final(engine: Engine) -> None:
    sequence = engine.begin(20)
    sequence.advance(IDS[:5])
    sequence.close()
    sequence.close()
    after: tuple[Callable[[], object], ...] = (lambda: sequence.advance([1]), lambda: sequence.forget(1))
    for call in after:
        with pytest.raises(ValueError, match="the sequence is closed"):
            call()


def test_sequences_do_not_see_each_other(engine: Engine) -> None:
    texts = [IDS[:30], IDS[200:237], IDS[300:309]]
    alone = [behind(engine, text) for text in texts]
    sequences = [engine.begin(60) for _ in texts]
    for sequence, text in zip(sequences, texts, strict=True):
        sequence.advance(text[:-1])
    tokens = [text[-1] for text in texts]
    together = engine.step(sequences, tokens)
    assert together.shape == (3, alone[0].shape[1])
    assert [sequence.tokens for sequence in sequences] == texts
    for row, expected in zip(together, alone, strict=True):
        assert np.abs(row - expected[0]).max() < ROUNDING
    # Two of them, in another order.
    again = engine.step([sequences[2], sequences[0]], [7, 8])
    assert sequences[1].tokens == texts[1]
    for row, ids in zip(again, ([*texts[2], 7], [*texts[0], 8]), strict=True):
        assert np.abs(row - behind_of(engine, sequences, ids)[0]).max() < ROUNDING


def behind_of(engine: Engine, sequences: list[Sequence], ids: list[int]) -> np.ndarray:
    """As ``behind``, after the others have given their room back."""
    for sequence in sequences:
        sequence.close()
    return behind(engine, ids)


def test_greedy_tokens_one_by_one_together_and_guessed(case: Case) -> None:
    engine = case.engine
    prompts = [IDS[:20], IDS[30:50]]
    answers = [list(greedy(engine, prompt, 12)) for prompt in prompts]
    assert len({token for answer in answers for token in answer}) > 3
    session = GenerationSession(engine)
    assert session.together(prompts, [12] * len(prompts)) == [session.tokens(prompt, 12) for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        ended = next((at + 1 for at, token in enumerate(answer) if token in engine.ends), 12)
        assert session.tokens(prompt, 12) == answer[:ended]
        assert [int(logits.argmax()) for logits in session.distributions(prompt, 12)] == answer[:ended]
        if engine.short_step > 1:
            speculation = Speculation("lookup", 3)
            with closing(engine.begin(32)) as sequence:
                guessed = speculate(sequence, engine.drafter(), prompt, 12, speculation, engine.chunk)
                assert list(guessed) == answer
            assert speculation.tally.steps + speculation.tally.accepted == 11


def test_a_closed_engine_has_written_its_profile(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    for name, files in (("heads", 1), ("latent", 1), ("fixed", 2)):
        folder = tmp_path / name
        folder.mkdir()
        engine = open_engine(bundles[name], THREADS, profile=folder / "profile")
        assert len(list(greedy(engine, IDS[:8], 3))) == 3
        engine.close()
        written = list(folder.iterdir())
        assert len(written) == files and all(path.stat().st_size > 1000 for path in written)
