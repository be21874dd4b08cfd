import html
import math
import re
from html.parser import HTMLParser

import pytest
from sample_report import ATTACK, groups, language, make_report

from glmexport.foundation.languages import language_name
from glmexport.report import text
from glmexport.report.allocation import summarize
from glmexport.report.document import CalibrationSummary, Report
from glmexport.report.html import render_html
from glmexport.results.fidelity import Overlap
from glmexport.results.gate import Gate
from glmexport.results.record import Verdict

VOID = {"meta", "link", "br"}


class Outline(HTMLParser):
    """Every start tag with its attributes, the text, and whether the tags nest."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def text(self):
        joined = "".join(self.words).replace(text.THIN, " ").replace(text.FIXED, " ")
        return re.sub(r"\s+", " ", joined)


def read(report):
    return Outline(render_html(report)).text()


def test_the_page_loads_and_runs_nothing(report):
    page = render_html(report)
    outline = Outline(page)
    names = {tag for tag, _ in outline.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "form", "base", "image", "use"}
    for _, attributes in outline.tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:,"))
    assert "<script" not in page
    assert not re.search(r"https?:|url\(|@import", page)
    policy = next(attributes for tag, attributes in outline.tags if "http-equiv" in attributes)
    assert policy["content"].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_ids_are_unique_and_every_reference_has_one(report):
    outline = Outline(render_html(report))
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in outline.tags:
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
        assert set(attributes.get("aria-labelledby", "").split()) <= set(ids)


def test_hostile_text_is_shown_as_text(report):
    page = render_html(report)
    assert ATTACK not in page
    assert html.escape(ATTACK) in page
    assert "\u202e" not in page
    assert "\u0000" not in page
    assert "‹U+202E›" in page


@pytest.mark.parametrize("key", ["bundle", "target", "recipe", "family", "checkpoint", "bundle_digest"])
def test_hostile_names_are_shown_as_text(report, changed, key):
    subject = report.subject.model_copy(update={key: f'"><img src=x onerror=alert(1)>{ATTACK}'})
    page = render_html(changed(subject=subject, command=ATTACK, versions={ATTACK: ATTACK}, limits=(ATTACK,)))
    assert "<img" not in page
    assert "<script" not in page
    Outline(page)


def test_foreign_text_keeps_its_direction_to_itself(report):
    outline = Outline(render_html(report))
    tokens = [attributes for tag, attributes in outline.tags if tag == "bdi"]
    assert tokens
    assert {attributes["dir"] for attributes in tokens} == {"auto"}
    assert any(attributes.get("lang") == "ar" for attributes in tokens)


def test_bounds_stand_below_what_was_measured_and_in_the_margin(report):
    page = render_html(report)
    gates = page[page.index('id="gates"') : page.index('<dl class="figures">')]
    estimated = [gate for gate in report.gates if gate.lower is not None]
    assert gates.count('class="bounds"') == len(estimated) == 4
    assert "0.0358 to 0.0474" in read(report)
    assert "5.00 % of samples" in read(report) and "Limits: target cpu-avx512vnni" in read(report)


def test_a_share_that_has_to_be_large_is_measured_by_what_is_missing(report, changed):
    gate = Gate(
        name="Agreement", language="en", value=0.94, limit=0.9, unit="share", direction="at least", sample="",
        verdict=Verdict.PASS, lower=0.92, upper=0.95, confidence=0.95,
    )  # fmt: skip
    page = read(changed(gates=(gate,), verdict=Verdict.PASS))
    assert "40 % to spare" in page and "92.0 % to 95.0 %" in page


def test_prompts_that_differ_are_shown_side_by_side(report, changed):
    page = read(report)
    assert "60 conversations" in page and "3 more are of kinds that both templates refuse" in page
    section = page[page.index("60 conversations") : page.index("Worst tokens, in context")]
    assert "several turns, Arabic" in section and "<|assistant|>↵" in section and "<|user|>" in section
    alike = read(changed(prompts=report.prompts.model_copy(update={"differences": ()})))
    assert "All are the same." in alike
    assert "conversations" not in read(changed(prompts=None))
    unopened = report.prompts.model_copy(update={"differences": (), "unopened": "no such tokenizer"})
    assert "None were compared" in read(changed(prompts=unopened))
    refused = report.prompts.model_copy(update={"compared": 0, "refused": 147, "differences": ()})
    assert "refuse all 147 conversations" in read(changed(prompts=refused))


def test_free_answers_side_by_side(report, changed):
    page = render_html(report)
    section = page[page.index('id="answers"') : page.index('id="weights"') if 'id="weights"' in page else None]
    assert 'href="#answers"' in page
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td class="n">(.*?)</td><td class="n">(.*?)</td>', section)
    shown = {re.sub("<.*?>", "", name): (before, after) for name, before, after in rows}
    assert shown["Well-formed tool calls, in a batch"] == ("30", "28")
    assert shown["Answers in the original&#39;s language"] == ("108", "107")
    assert shown["chrF of translations"] == ("0.465", "0.460")
    assert "score 1 → 0" in section
    # Grey as far as both go together, and not into the middle of a character.
    assert '<span class="same">हर </span>किसी' in section and '<span class="same">हर </span>कोई' in section
    assert "<script>" not in section and "\u202e" not in section
    without = render_html(changed(behaviour=None))
    assert 'id="answers"' not in without and "#answers" not in without


def test_bands_of_positions(report, changed):
    page = read(report)
    assert "By position" in page and "16 to 63" in page and "0.0230" in page
    one = changed(fidelity=report.fidelity.model_copy(update={"bands": report.fidelity.bands[:1]}))
    assert "By position" not in read(one)


def test_the_noise_floor_is_the_last_row(report, changed):
    assert "Original, again" in read(report) and "is no difference" in read(report)
    without = changed(fidelity=report.fidelity.model_copy(update={"noise_floor": None}))
    assert "Original, again" not in read(without) and "is no difference" not in read(without)


def test_the_verdict_and_every_gate_come_before_the_first_section_heading(report):
    page = read(report)
    first = page[: page.index("At every position")]
    assert "✕ BLOCK" in first
    assert "8 gates: 1 BLOCK, 1 INCONCLUSIVE, 1 WARN, 5 PASS." in first
    for gate in report.gates:
        assert gate.name in first
        assert gate.sample in first
    assert first.index("Arabic") < first.index("Swahili") < first.index("English")
    assert "at most 0.0400 nats" in first
    assert "3.0 % too much" in first
    assert "128 % to spare" in first


def test_every_language_is_there_and_the_worst_is_named(report):
    page = read(report)
    for row in report.fidelity.languages:
        assert f"{language_name(row.language)} {row.language}" in page
    assert "Arabic ar worst" in page
    assert "0.0412 worst" in page


def test_causes_and_their_sum(report):
    page = read(report)
    assert "Together they add 0.0226 nats; the whole bundle was measured at 0.0228 nats." in page
    for share in report.shares:
        assert share.name in page


def test_speed_is_set_against_the_original_and_the_memory(report):
    page = read(report)
    assert "2.91× faster (2.82× to 2.97×)" in page
    assert "2.89× faster (2.84× to 2.98×)" in page
    assert "2.84× less" in page
    assert "1.93 s1.89 s to 1.99 s" in page
    # Loaded once, without bounds.
    assert "21.4 s3.12 s6.86× faster" in page.replace("> <", "><")
    assert "It reaches 69.1 % of that." in page


def test_what_was_not_measured_says_why(report):
    page = read(report)
    assert "Peak memory of each process: VmHWM, loading included." in page
    assert "Energy was not measured: The counters are for the administrator only." in page
    assert "not measured: 8 rounds, it takes 64" in page and "not measured: 8 rounds, it takes 662" in page


def test_nodes_that_ran_elsewhere(report, changed):
    page = read(report)
    assert "Nodes of the graph: 4 on CPUExecutionProvider, 161 on CUDAExecutionProvider." in page
    assert "1 ran elsewhere without being meant to." in page and f"{ATTACK} (Softmax) on CPUExecutionProvider" in page
    assert "3 on the CPU only compute shapes" in page
    assert ATTACK not in render_html(report)
    placement = report.performance.placement.model_copy(update={"unexpected": (), "on_purpose": ()})
    performance = report.performance.model_copy(update={"placement": placement})
    page = read(changed(performance=performance))
    assert "elsewhere" not in page and "only compute shapes" not in page


def test_an_original_that_was_not_measured(report, changed):
    performance = report.performance.model_copy(
        update={"original": None, "ratios": None, "original_absent_because": f"It needs 17.5 GiB. {ATTACK}"}
    )
    page = render_html(changed(performance=performance))
    assert "The original was not measured" in page
    assert "It needs 17.5 GiB." in page
    assert ATTACK not in page
    assert "× faster" not in Outline(page).text()


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((0.50, 0.49, 0.52), "2.00× slower (1.92× to 2.04×)"),
        ((1.02, 0.98, 1.05), "no sure difference (0.980× to 1.05×)"),
        ((1.50, 0.0, float("inf")), "1.50× faster"),
    ],
)
def test_a_difference_is_called_one_if_its_bounds_agree(report, changed, ratio, words):
    keys = dict(zip(("value", "lower", "upper"), ratio, strict=True))
    decode = report.performance.ratios.decode_tokens_per_s.model_copy(update=keys)
    ratios = report.performance.ratios.model_copy(update={"decode_tokens_per_s": decode})
    performance = report.performance.model_copy(update={"ratios": ratios})
    page = read(changed(performance=performance))
    assert words in page


def test_without_a_build_record(changed):
    page = read(changed(quantization=None, calibration=None))
    assert "There is no build record with this bundle" in page
    assert "Whether evaluation repeats calibration text was therefore not checked." in page
    assert "Fallbacks None" not in page


def test_fallbacks_are_named_and_so_is_their_absence(report, changed):
    assert "None. Every matrix was quantized as the recipe says." in read(report)
    quantization = report.quantization.model_copy(update={"fallbacks": (f"layer 3: singular {ATTACK}",)})
    page = read(changed(quantization=quantization))
    assert "departed from its recipe 1 time:" in page
    assert "layer 3: singular" in page


def test_rows_that_were_not_left_to_the_solver_are_counted(report, changed):
    linears = tuple(x.model_copy(update={"nearest_rows": 2, "folded": True}) for x in report.quantization.linears)
    linears = (linears[0].model_copy(update={"double": True}), *linears[1:])
    page = read(changed(quantization=report.quantization.model_copy(update={"linears": linears})))
    assert f"it serves them better or their matrix fell back: {2 * len(linears)}." in page
    assert f"by powers of two: {len(linears)}." in page
    assert "fp64 factored: 1." in page
    assert "serves them better" not in read(changed(calibration=None))


def test_overlap_is_stated_either_way(report, changed):
    assert "No overlap. None of the 216 evaluation documents" in read(report)
    overlap = Overlap(calibration_documents=9, evaluation_documents=216, shared_documents=2, shared_lines=31)
    calibration = CalibrationSummary.model_validate({**dict(report.calibration), "overlap": overlap})
    page = read(changed(calibration=calibration))
    assert "2 of the 216 evaluation documents and 31 distinct lines also occur" in page
    assert "No overlap" not in page


def test_the_heat_map_shows_every_layer_with_error_and_bits():
    page = render_html(make_report(layers=23))
    for layer in range(23):
        assert f'<th scope="col">{layer}</th>' in page
    assert page.count('class="heat"') == 3  # blocks 0 to 19, 20 to 22, and what lies outside them
    assert "8 bit" in page


def test_experts_of_one_block_are_represented_by_the_worst(report, changed):
    first = next(linear for linear in report.quantization.linears if linear.part == "down")
    experts = tuple(
        first.model_copy(update={"name": f"expert {index}", "relative_error": error, "bits": 4})
        for index, error in enumerate((0.01, 0.051, 0.02))
    )
    quantization = report.quantization.model_copy(update={"linears": experts})
    assert re.search(r"5\.1<small>4 bit, worst of 3</small>", render_html(changed(quantization=quantization)))


def test_where_the_bits_of_a_budget_went(report, changed):
    assert "Where the bits went" not in read(report)
    linears = report.quantization.linears
    quantization = report.quantization.model_copy(update={"groups": groups(linears)})
    page = render_html(changed(quantization=quantization))
    words = Outline(page).text()
    total = sum(1e-5 * (1 + index) for index in range(len(linears)))
    assert f"The losses add up to {text.number(total)} nats; the whole bundle was measured at 0.0228 nats." in (
        words.replace("\xa0", " ")
    )
    for index in range(len(linears)):
        assert f'title="Alone it costs {text.number(1e-5 * (1 + index))} nats"' in page
        row = f"{'' if index % 3 else '≈ '}{text.number(1e-5 * (1 + index))}"
        assert page.count(f'<td class="n">{row}</td>') >= (2 if index >= len(linears) - 8 else 1)
    costliest = words[words.index("What costs most") : words.index("All 14 groups")]
    assert costliest.index("lm_head") < costliest.index("embedding") < costliest.index("block 2 down")
    assert "block 0 qkv" not in costliest
    assert "Group costs" not in costliest
    # Fourteen groups: two of 8 bits inside the blocks, two symmetric outside, and the rest.
    (inside, outside, others) = (
        summary for summary in summarize(linears, quantization.groups).spending.formats[::-1]
    )
    assert (inside.groups, outside.groups, others.groups) == (2, 2, 10)


def test_matrices_of_one_group_count_once(report):
    first, second = (
        report.quantization.linears[0].model_copy(update={"name": name}) for name in ("query", "key")
    )
    shared = groups((first,))[0].model_copy(update={"matrices": ("query", "key")})
    cell = summarize((first, second), (shared,)).bands[0].rows[0][1][0]
    assert (cell.matrices, cell.loss_nats) == (2, shared.loss_nats)


def test_what_held_out_text_confirmed(report, changed):
    assert "Correction kept" not in read(report)
    linears = tuple(
        linear.model_copy(update={"shrinkage": 0.25 * linear.layer, "unpolished_rows": 100 * linear.layer})
        if linear.layer is not None
        else linear
        for linear in report.quantization.linears
    )
    quantization = report.quantization.model_copy(update={"linears": linears})
    page = render_html(changed(quantization=quantization))
    assert f'<td class="n">{text.percent(0.25)}</td><td class="n">300</td>' in page
    assert '<td class="n">–</td><td class="n">–</td>' in page


def test_an_error_that_was_not_measured(report, changed):
    """As of an embedding, which no text is run through; others of its part keep their figures."""
    lost = {"relative_error": math.nan, "round_to_nearest_error": math.nan}
    embedding = next(linear for linear in report.quantization.linears if linear.part == "embedding")
    linears = tuple(
        linear.model_copy(update=lost)
        if (linear.layer, linear.part) in ((None, "embedding"), (0, "o"))
        else linear
        for linear in report.quantization.linears
    )
    quantization = report.quantization.model_copy(update={"linears": linears})
    page = render_html(changed(quantization=quantization))
    assert "not a number" not in page
    assert page.count('<td class="none">–<small>') == 2
    assert page.count('<td class="n">not measured</td>') == 3 + 2 + 2  # errors; tokens outside the blocks; energy
    survey = {part.part: part for part in summarize(linears).parts}
    assert survey[embedding.part].median_error is None and survey[embedding.part].largest_error is None
    kept = [linear.relative_error for linear in linears if linear.part == "o" and linear.layer != 0]
    assert survey["o"].largest_error == max(kept)


def test_limits_and_their_absence(report, changed):
    page = read(report)
    for limit in report.limits:
        assert limit in page
    assert "Read that as an omission" in read(changed(limits=()))


def test_provenance(report):
    page = read(report)
    assert report.subject.bundle_digest in page
    assert report.subject.checkpoint_digest in page
    assert report.command in page
    assert "onnxruntime 1.32.0" in page
    assert "avx512_vnni" in page


def test_a_bundle_that_answers_nan_still_has_a_report(report, changed):
    broken = language("ar", math.nan, 0.0).model_copy(update={"kl_mean_nats": math.nan})
    infinite = language("en", 9.0, 0.01).model_copy(
        update={"kl_mean_nats": math.inf, "perplexity_bundle": math.inf}
    )
    fidelity = report.fidelity.model_copy(update={"languages": (broken, infinite)})
    fidelity = fidelity.model_copy(update={"overall": broken})
    gate = Gate(
        name="Mean divergence", language="ar", value=math.nan, limit=0.05, unit="nats", direction="at most",
        sample="1 document", verdict=Verdict.BLOCK,
    )  # fmt: skip
    page = read(changed(fidelity=fidelity, gates=(gate,)))
    assert "not a number" in page
    assert "beyond the limit" in page


def test_rendering_is_deterministic(report):
    page = render_html(report)
    assert render_html(Report.model_validate_json(report.model_dump_json())) == page
    shuffled = report.model_copy(update={"versions": dict(reversed(report.versions.items()))})
    assert render_html(Report.model_validate(shuffled.model_dump())) == page


def test_the_bits_of_every_block_s_experts(report, changed):
    first = report.quantization.linears[0]
    linears = tuple(
        first.model_copy(update={"name": f"expert {index}", "part": "expert_down", "bits": bits, "layer": 3})
        for index, bits in enumerate((2, 4, 4, 8))
    )
    cold = [
        group.model_copy(update={"expert_part": "expert_down", "cold": index == 1, "tried": False})
        for index, group in enumerate(groups(linears))
    ]
    quantization = report.quantization.model_copy(update={"linears": linears, "groups": tuple(cold)})
    spending = summarize(linears, cold).spending
    (row,) = spending.experts
    assert (row.layer, row.part, dict(row.experts), row.cold) == (3, "expert_down", {2: 1, 4: 2, 8: 1}, 1)
    ((formats, whole),) = spending.groups
    assert formats == "2 and 4 and 8 bit, by expert" and whole.name == "block 3 expert_down, 4 experts"
    assert whole.loss_nats == spending.loss_nats and whole.stored_bits == spending.stored_bits
    words = Outline(render_html(changed(quantization=quantization))).text()
    assert "Bits by expert" in words and "block 3 expert_down, 4 experts" in words
    assert "Bits by expert" not in read(report)
