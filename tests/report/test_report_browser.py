"""The report as people see it: opened in the system's Chromium, from a file, as a mail's attachment would be."""

from __future__ import annotations

import math
import shutil

import pytest
from playwright.sync_api import sync_playwright
from sample_report import ATTACK, groups, language, make_report

from glmexport.foundation.languages import language_name
from glmexport.report.document import HTML_NAME
from glmexport.report.write import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
PHONE, DESK = 390, 1200
HOSTILE = f'"><img src=https://example.org/x onerror=alert(1)>{ATTACK}\u202e\u2066'

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH to open the report in")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Without a sandbox of its own, which containers seldom allow: the page is ours and loads nothing.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def whole(layers=40):
    """Every section there is; the longest language names, and a bar that is as long as its axis."""
    report = make_report(layers)
    rows = (*report.fidelity.languages, language("id", 123456.7, 0.06), language("vi", 9, 1e-6))
    fidelity = report.fidelity.model_copy(update={"languages": rows, "worst_language": "id"})
    linears = report.quantization.linears
    fallbacks = (f"layer 3: {HOSTILE}",)
    quantization = report.quantization.model_copy(update={"groups": groups(linears), "fallbacks": fallbacks})
    return report.model_copy(update={"fidelity": fidelity, "quantization": quantization})


class Visit:
    """One page with everything that it said and asked for."""

    def __init__(self, browser, path, width=DESK, scheme="light"):
        self.url = path.as_uri()
        self.said, self.asked = [], []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(self.url, wait_until="load")
        self.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")

    def check(self):
        """Nothing said, nothing asked for but the file and the icon that is in it."""
        assert self.said == []
        assert [url for url in self.asked if not url.startswith("data:")] == [self.url]

    def boxes(self, selector):
        """[[left, top, right, bottom, text], …] of all that match, px of the page."""
        return self.page.evaluate(
            """selector => [...document.querySelectorAll(selector)].map(each => {
                const box = each.getBoundingClientRect()
                return [box.left + scrollX, box.top + scrollY, box.right + scrollX, box.bottom + scrollY,
                        each.textContent]
            })""",
            selector,
        )


@pytest.fixture
def visit(browser, tmp_path):
    pages = []

    def call(report, **options):
        write_report(report, tmp_path)
        pages.append(Visit(browser, tmp_path / HTML_NAME, **options))
        return pages[-1]

    yield call
    for each in pages:
        each.page.close()


def charts(seen):
    """Every chart as [frame, rectangles, texts], px."""
    return seen.page.evaluate(
        """() => [...document.querySelectorAll('svg.chart')].map(chart => {
            const box = each => {
                const found = each.getBoundingClientRect()
                return [found.left, found.top, found.right, found.bottom, each.textContent]
            }
            return [box(chart), [...chart.querySelectorAll('rect')].map(box),
                    [...chart.querySelectorAll('text')].map(box)]
        })"""
    )


@pytest.mark.parametrize(("width", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_the_page(visit, tmp_path, width, scheme):
    """Seen on a desk and a phone, by day and by night."""
    seen = visit(whole(), width=width, scheme=scheme)
    seen.page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
    seen.check()
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    style = "getComputedStyle(document.documentElement)"
    paper, ink = (seen.page.evaluate(f"{style}.{name}") for name in ("backgroundColor", "color"))
    bright = sum(map(int, paper.strip("rgb()").split(","))) > sum(map(int, ink.strip("rgb()").split(",")))
    assert bright == (scheme == "light")


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_every_chart_is_drawn_within_its_frame(visit, width):
    report = whole()
    drawn = charts(visit(report, width=width))
    assert len(drawn) == 5
    for (left, top, right, bottom, _), marks, texts in drawn:
        assert right > left and bottom > top
        assert marks and all(x1 > x0 and y1 > y0 for x0, y0, x1, y1, _ in marks)
        for x0, y0, x1, y1, words in [*marks, *texts]:
            assert left - 0.5 <= x0 and x1 <= right + 0.5 and top - 0.5 <= y0 and y1 <= bottom + 0.5, words
    labels = {words for _, _, texts in drawn for *_, words in texts}
    assert {language_name(row.language) for row in report.fidelity.languages} <= labels


@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize("low", [1e-6, 3e-4, 0.02, 0.5])
def test_words_of_charts_do_not_cover_each_other(visit, width, low):
    """Wherever on the axis median, mean and percentile are."""
    report = whole(2)
    overall = report.fidelity.overall.model_copy(
        update={"kl_p50_nats": low, "kl_mean_nats": low * 1.5, "kl_p99_nats": low * 9}
    )
    fidelity = report.fidelity.model_copy(update={"overall": overall})
    for _, _, texts in charts(visit(report.model_copy(update={"fidelity": fidelity}), width=width)):
        for index, (left, top, right, bottom, words) in enumerate(texts):
            for x0, y0, x1, y1, other in texts[index + 1 :]:
                # Boxes are those of the font, a little higher than what is drawn.
                apart = right <= x0 or x1 <= left or bottom - 4 <= y0 or y1 - 4 <= top
                assert apart, (words, other)


def test_bars_are_as_long_as_what_they_show(visit):
    report = whole(2)
    seen = visit(report)
    bars = seen.boxes("svg[aria-labelledby^='divergence'] rect.bar")
    values = sorted((row.kl_mean_nats for row in report.fidelity.languages), reverse=True)
    assert len(bars) == len(values)
    longest = bars[0][2] - bars[0][0]
    for (left, _, right, _, _), value in zip(bars[:-1], values, strict=False):
        assert right - left == pytest.approx(longest * value / values[0], abs=1)
    # What is there leaves a trace, however small.
    assert bars[-1][2] > bars[-1][0]


def test_a_report_of_broken_measurements_is_drawn_too(visit):
    report = whole(2)
    rows = tuple(
        row.model_copy(update={"kl_mean_nats": bad, "perplexity_bundle": bad})
        for row, bad in zip(report.fidelity.languages, (math.nan, math.inf, *[0.01] * 9), strict=True)
    )
    seen = visit(report.model_copy(update={"fidelity": report.fidelity.model_copy(update={"languages": rows})}))
    seen.check()
    assert len(charts(seen)) == 5


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_hostile_text_stays_text(visit, width):
    report = whole(2)
    words = tuple(
        word.model_copy(update=dict.fromkeys(("context", "expected", "given", "document"), HOSTILE))
        for word in report.fidelity.worst_tokens
    )
    names = ("bundle", "checkpoint", "adapter", "adapter_digest", "recipe", "target", "family")
    seen = visit(
        report.model_copy(
            update={
                "fidelity": report.fidelity.model_copy(update={"worst_tokens": words}),
                "subject": report.subject.model_copy(update=dict.fromkeys(names, HOSTILE)),
                "command": HOSTILE * 9,
                "limits": (HOSTILE,),
            }
        ),
        width=width,
    )
    seen.check()
    assert seen.page.evaluate("document.querySelectorAll('script, img, iframe, [onerror]').length") == 0
    shown = seen.page.inner_text("h1")
    assert ATTACK in shown and "‹U+202E›" in shown and "\u202e" not in seen.page.content()
    assert seen.page.inner_text("pre").count(ATTACK) == 9
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_policy_of_the_page_forbids_what_is_not_in_it(visit, tmp_path):
    """A page that somebody has changed: no script runs, and nothing is loaded."""
    report = whole(2)
    write_report(report, tmp_path)
    path = tmp_path / "changed.html"
    page = (tmp_path / HTML_NAME).read_text(encoding="utf-8")
    assert page.index("Content-Security-Policy") < page.index("<style>")
    added = "<script>document.title = 'run'</script><img src='file:///etc/hostname'><p onclick='alert(1)'>"
    path.write_text(page.replace("</body>", f"{added}</body>"), encoding="utf-8")
    browser = visit(report).page.context.browser
    seen = Visit(browser, path)
    try:
        assert seen.page.title() != "run"
        assert any("Content Security Policy" in words for words in seen.said)
        assert seen.page.evaluate("document.querySelector('img').naturalWidth") == 0
    finally:
        seen.page.close()


def test_printed(visit, tmp_path):
    """On paper: dark on light whatever the screen is, nothing to click, and every table in full."""
    seen = visit(whole(), scheme="dark")
    seen.page.emulate_media(media="print")
    assert seen.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert seen.page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert set(seen.page.eval_on_selector_all(".scroll", "all => all.map(e => getComputedStyle(e).overflowX)")) == {
        "visible"
    }
    # A4 without its margins, at 96 px an inch.
    seen.page.set_viewport_size({"width": round((210 - 28) / 25.4 * 96), "height": 900})
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= round((210 - 28) / 25.4 * 96)
    seen.page.screenshot(path=tmp_path / "print.png", full_page=True)
    pdf = seen.page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF-")
    seen.check()
