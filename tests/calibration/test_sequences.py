"""Packing: sequences of one length, each led in by the prefix once, every language at its quota."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmexport.calibration.corpus import USER, Document, shipped_documents
from glmexport.calibration.sequences import CalibrationSet, pack
from glmexport.foundation.errors import InputError
from glmexport.foundation.recipe import CalibrationPlan, open_recipe
from glmexport.tokenizer.tokenizer import Tokenizer

LENGTH = 64


def plan(tokens: int = 1024, **quota: float) -> CalibrationPlan:
    return CalibrationPlan(tokens=tokens, sequence_length=LENGTH, quota=quota or {"en": 1})


def letters(*sizes: int, language: str = "en") -> list[Document]:
    """Documents of so many tokens each, no letter twice in a row."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return [
        Document(str(number), language, "".join(alphabet[(number + at) % 26] for at in range(size)))
        for number, size in enumerate(sizes)
    ]


def unpacked(found: CalibrationSet, prefix: list[int]) -> list[int]:
    """All tokens but those of prefixes, in order."""
    return [token for token in found.ids.flatten().tolist() if token not in prefix]


def test_the_tokenizer_has_glm_s_prefix(tokenizer: Tokenizer) -> None:
    assert tokenizer.prefix == [tokenizer.special_tokens["[gMASK]"], tokenizer.special_tokens["<sop>"]]


def test_sequences_by_hand(tokenizer: Tokenizer) -> None:
    """80 tokens: 62 behind the first prefix, 18 behind the second, and 42 of the next behind a third."""
    texts = letters(80, 3000)
    found = pack(texts, tokenizer, plan(), 4096)
    one, two = (tokenizer.encode(document.text) for document in texts)
    prefix = tokenizer.prefix
    assert found.ids[0].tolist() == prefix + one[:62]
    assert found.ids[1].tolist() == prefix + one[62:] + prefix + two[:42]
    assert found.ids[2].tolist() == prefix + two[42:104]
    assert found.ids.shape == (16, LENGTH) and found.ids.dtype == torch.int64
    assert found.prefix == 2
    # The last two of sixteen are held out: the one document that they could have to themselves does not exist.
    assert found.selection.tolist() == [False] * 14 + [True] * 2
    assert found.tokens == 14 * 62 and found.selection_tokens == 2 * 62


@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=40))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sequences_of_any_documents(tokenizer: Tokenizer, sizes: list[int]) -> None:
    documents = letters(*sizes, 800)
    found = pack(documents, tokenizer, plan(), 4096)
    prefix = tokenizer.prefix
    assert all(sequence[: len(prefix)] == prefix for sequence in found.ids.tolist())
    # No text is lost, repeated or padded out.
    text = [token for document in documents for token in tokenizer.encode(document.text)]
    held = found.ids[found.selection]
    packed = [token for token in found.ids[~found.selection].flatten().tolist() if token not in prefix]
    assert packed == text[: len(packed)]
    apart = [token for token in held.flatten().tolist() if token not in prefix]
    begins = [len(packed), *accumulate(len(tokenizer.encode(document.text)) for document in documents)]
    assert any(text[begin : begin + len(apart)] == apart for begin in begins if begin >= len(packed))


@given(sizes=st.lists(st.integers(1, 70), min_size=16, max_size=40))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_prefix_is_never_cut_in_two(tokenizer: Tokenizer, sizes: list[int]) -> None:
    """A second half of it at the head of a sequence would be an input that no model ever sees."""
    found = pack(letters(*sizes, 800), tokenizer, plan(), 4096)
    mask, sop = tokenizer.prefix
    for sequence in found.ids.tolist():
        assert all((one == mask) == (two == sop) for one, two in pairwise(sequence))


def test_a_document_that_begins_with_the_last_position(tokenizer: Tokenizer) -> None:
    """The one above in its smallest form: 61 tokens leave one position, too few for a prefix."""
    texts = letters(61, 3000)
    found = pack(texts, tokenizer, plan(), 4096)
    mask, sop = tokenizer.prefix
    assert found.ids[1].tolist()[:3] == [mask, sop, tokenizer.encode(texts[1].text)[0]]


def test_a_rendered_conversation_is_led_in_once(tokenizer: Tokenizer) -> None:
    """The chat template writes the prefix itself."""
    text = tokenizer.render([{"role": "user", "content": "hello " * 400}])
    found = pack([Document("chat", "en", text)], tokenizer, plan(), 4096)
    assert tokenizer.encode(text)[:2] == tokenizer.prefix
    assert found.ids[0].tolist() == tokenizer.encode(text)[:LENGTH]


def test_a_sequence_is_no_longer_than_the_context(tokenizer: Tokenizer) -> None:
    assert pack(letters(3000), tokenizer, plan(), 40).ids.shape == (26, 40)


@pytest.mark.parametrize("quota", [{"zh": 1, "en": 1}, {"en": 6, "zh": 3, "fr": 1}, {"fr": 0.1, "zh": 0.2}])
def test_every_language_has_its_share(tokenizer: Tokenizer, quota: dict[str, float]) -> None:
    documents = shipped_documents("calibration", quota)
    found = pack(documents, tokenizer, plan(8192, **quota), 4096)
    assert list(found.tokens_per_language) == list(quota)
    for language, share in quota.items():
        wanted = 8192 * share / sum(quota.values()) / LENGTH
        assert abs(found.languages.count(language) - wanted) <= 1
    assert len(found.languages) == len(found.ids)
    assert abs(len(found.ids) - 8192 / LENGTH) <= 1


def test_shares_of_absent_languages_go_to_the_others(tokenizer: Tokenizer) -> None:
    """Text of the user's is named in every recipe and seldom given."""
    found = pack(letters(9000), tokenizer, plan(4096, en=1, user=3), 4096)
    assert found.tokens_per_language == {"en": 56 * 62}
    both = [*letters(9000), *letters(9000, language=USER)]
    found = pack(both, tokenizer, plan(4096, en=1, user=3), 4096)
    assert found.tokens_per_language == {"en": 14 * 62, USER: 42 * 62}


def test_the_shipped_text_fills_a_shipped_plan(tokenizer: Tokenizer) -> None:
    shipped_plan = open_recipe("w4g32").calibration
    assert shipped_plan is not None
    found = pack(shipped_documents("calibration"), tokenizer, shipped_plan, 8192)
    assert set(found.languages) == set(shipped_plan.quota) - {USER}
    assert found.ids.shape[1] == shipped_plan.sequence_length
    assert found.ids.numel() > 0.9 * shipped_plan.tokens


@pytest.mark.parametrize("sizes", [(), (10,), (200,)])
def test_too_little_text_is_refused(tokenizer: Tokenizer, sizes: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"too small: \d+ tokens in whole sequences of 64, of 1024") as refused:
        pack(letters(*sizes), tokenizer, plan(), 4096)
    assert "--calibration" in refused.value.next_step


def test_a_quarter_of_the_plan_is_enough(tokenizer: Tokenizer) -> None:
    assert len(pack(letters(4 * 62), tokenizer, plan(), 4096).ids) == 4


def test_weights_sum_to_one_and_lift_the_languages_with_little_text(tokenizer: Tokenizer) -> None:
    documents = [*letters(9000), *letters(9000, language="zh")]
    found = pack(documents, tokenizer, plan(1280, en=4, zh=1), 4096)
    weights = found.weights()
    assert weights.shape == (20,)
    for part in (found.selection, ~found.selection):
        assert float(weights[part].double().sum() * 62) == pytest.approx(1, rel=1e-6)
    shares = {
        language: sum(
            float(weights[index] * 62)
            for index, name in enumerate(found.languages)
            if name == language and not found.selection[index]
        )
        for language in ("en", "zh")
    }
    # The say grows with the square root of the text.
    counts = found.tokens_per_language
    assert shares["en"] == pytest.approx((counts["en"] / counts["zh"]) ** 0.5 * shares["zh"], rel=1e-6)


def test_selection_is_an_eighth_and_leaves_every_language_some(tokenizer: Tokenizer) -> None:
    names = ["en", "zh", "ja", "ko", "fr"]
    documents = [document for name in names for document in letters(*[90] * 40, language=name)]
    found = pack(documents, tokenizer, plan(64 * 24, en=9, zh=6, ja=5, ko=3, fr=1), 4096)
    # Not 24 // 8: the turn of the last language comes, but it has a single sequence.
    assert len(found.ids) == 24 and int(found.selection.sum()) == 2
    assert set(found.tokens_per_language) == set(names)


def test_selection_shares_no_document_where_there_are_enough(tokenizer: Tokenizer) -> None:
    """Letters of one document follow each other in the alphabet; a held-out sequence begins with one of its own."""
    documents = letters(*[100] * 60)
    found = pack(documents, tokenizer, plan(), 4096)
    fitted = found.ids[~found.selection]
    begun = int((fitted == tokenizer.prefix[0]).sum())
    held = found.ids[found.selection][0, 2:40].tolist()
    starts = [index for index, document in enumerate(documents) if tokenizer.encode(document.text)[:38] == held]
    assert starts and min(abs(start - begun) for start in starts) <= len(fitted)
    assert int(found.selection.sum()) == 2


def test_the_digest_is_that_of_the_ids(tokenizer: Tokenizer) -> None:
    first, same, other = (pack(letters(size, 2000), tokenizer, plan(), 4096) for size in (90, 90, 91))
    assert first.digest() == same.digest() != other.digest()
    assert first.digest().startswith("sha256:")


def calibration_set(*sequences: list[int], languages: tuple[str, ...] = (), held: int = 0) -> CalibrationSet:
    """Behind a prefix of one token; the last ``held`` are held out."""
    ids = torch.tensor([[99, *sequence] for sequence in sequences])
    selection = torch.arange(len(ids)) >= len(ids) - held
    return CalibrationSet(ids, languages or ("en",) * len(ids), 1, selection)


def test_different_text_counts_in_full() -> None:
    found = calibration_set([*range(0, 8)], [*range(10, 18)])
    assert found.effective_tokens == pytest.approx(16) == found.tokens


def test_text_that_is_held_out_does_not_count() -> None:
    assert calibration_set([*range(0, 8)], [*range(10, 18)], held=1).effective_tokens == pytest.approx(8)


def test_repeated_text_counts_once() -> None:
    once = [*range(0, 8)]
    assert calibration_set(*[once] * 5).effective_tokens == pytest.approx(8)
    # Behind another token the first three are new: their last four tokens are not the same.
    assert calibration_set(once + once).effective_tokens == pytest.approx(8 + 3)


def test_one_token_counts_as_the_few_contexts_that_it_begins_with() -> None:
    """[prefix] a, [prefix] a a, [prefix] a a a, and from then on a a a a."""
    assert calibration_set(*[[7] * 60] * 9).effective_tokens == pytest.approx(4)


def test_unequal_weights_count_as_kish_has_it() -> None:
    """Two sequences of one language and one of another, whose tokens weigh more by the square root of 2."""
    found = calibration_set([*range(0, 8)], [*range(10, 18)], [*range(20, 28)], languages=("en", "en", "zu"))
    heavy = 2**0.5
    assert found.effective_tokens == pytest.approx((16 + 8 * heavy) ** 2 / (16 + 8 * heavy**2))
    weights = found.weights().double()
    assert found.effective_tokens == pytest.approx(float(1 / (8 * weights.square().sum())), rel=1e-6)


def test_what_two_languages_share_counts_once_with_its_mean_weight() -> None:
    same = [*range(0, 8)]
    found = calibration_set(same, same, [*range(20, 28)], languages=("zu", "en", "en"))
    mean = (2**0.5 + 1) / 2
    assert found.effective_tokens == pytest.approx((8 * mean + 8) ** 2 / (8 * mean**2 + 8))
