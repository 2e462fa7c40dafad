"""The result page in a real browser: what it shows, what keys and filters do, and what it cannot.

The browser is a headless Chromium that is spoken to through two pipes (the DevTools protocol):
real key strokes, real layout, and every request that the page makes.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import select
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from emrrg.data.dataset import PhantomStudies, RecordStudies
from emrrg.data.records import Record
from emrrg.errors import InputError
from emrrg.evaluation import Evaluation
from emrrg.heatmap import SentenceMap
from emrrg.metrics import score_reports
from emrrg.metrics.clinical import (
    FINDINGS,
    score_comparisons,
    score_labels,
    score_policies,
    score_sides,
)
from emrrg.metrics.groups import group_studies
from emrrg.metrics.labeler import tidy
from emrrg.result_page import (
    choose_cases,
    compare_findings,
    histogram,
    is_synthetic,
    mark_report,
    write_result_page,
)
from emrrg.scoring import RULES

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
PATIENCE = 60  # seconds for one answer, on a busy machine


class Browser:
    """One page in a headless Chromium."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        ends = [*os.pipe(), *os.pipe()]
        # Out of the way of 3 and 4, from which the browser reads commands and writes answers.
        above = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
        for end in ends:
            os.close(end)
        commands_out, self.commands, self.answers, answers_in = above
        places = [
            (os.POSIX_SPAWN_DUP2, commands_out, 3),
            (os.POSIX_SPAWN_DUP2, answers_in, 4),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe",
            f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self.process = os.posix_spawn(
            CHROMIUM, [CHROMIUM, *flags], os.environ, file_actions=places, setsid=True
        )
        os.close(commands_out)
        os.close(answers_in)
        self.buffer, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.commands)
        os.close(self.answers)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come first are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def wait(self, method: str) -> None:
        """Until an event has come."""
        while all(event.get("method") != method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self.answers, 2**20) if ready else b""
            if not chunk:
                pytest.fail("the browser gives no answer")
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path, width: int = 1280, height: int = 900) -> None:
        """Load a file; what happened before is forgotten."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys one after the other, as a person does."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Escape": 27, "Tab": 9,
                 "Enter": 13}  # fmt: skip
        for key in keys:
            code = codes.get(key, ord(key[0].upper()))
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            named = {"key": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", **named, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))


NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome in PATH"
)

HARM = "</script><script>harm = 1</script><img src=x onerror='harm = 2'> \"a\" & {{ 7 * 7 }}"
REFERENCES = [
    "heart size is normal . lungs are clear . no pleural effusion .",
    "moderate cardiomegaly . small left pleural effusion .",
    "right lower lobe pneumonia . no pneumothorax .",
    "left basilar atelectasis . mild pulmonary edema .",
    f"lungs are clear . {HARM} .",
    "large right pneumothorax . possible left pneumonia .",
    "cardiomegaly is present . no edema .",
]
HYPOTHESES = [
    "heart size is normal . lungs are clear . no pleural effusion .",
    "moderate cardiomegaly . small right pleural effusion .",
    "lungs are clear . no pneumothorax .",
    "left basilar atelectasis . unchanged pulmonary edema .",
    f"lungs are clear . {HARM} .",
    "large right pneumothorax . no pneumonia .",
    "no cardiomegaly . large pleural effusion .",
]
COLUMNS = ("sex", "ward")


@dataclass(frozen=True)
class Written:
    """A page, and what it was made of."""

    path: Path
    result: Evaluation
    studies: RecordStudies
    synthetic: bool


def evaluated(folder: Path, synthetic: bool = False) -> tuple[Evaluation, RecordStudies]:
    """Studies of files with known texts, scored."""
    rng = np.random.default_rng(0)
    records = []
    for i, text in enumerate(REFERENCES):
        names = [folder / f"{i}-{view}.png" for view in range(1 + i % 2)]
        for name in names:
            size = (900, 700) if i == 1 else (40, 60)
            Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(name)
        attributes = {"sex": "FM"[i % 2], "ward": HARM if i == 4 else "a", "synthetic": synthetic}
        identity = f"study {i}{HARM if i == 4 else ''}"
        records.append(Record(identity, text, tuple(names), "test", None, attributes))
    studies = RecordStudies(records, 32, cache_bytes=0)
    columns = {name: [r.attributes[name] for r in records] for name in COLUMNS}
    groups = group_studies(columns)
    drawn: dict[str, Any] = {"bootstrap": 20, "seed": 0}
    scores = score_reports(
        HYPOTHESES, REFERENCES, meteor="off", train_reports=REFERENCES[1:3], groups=groups,
        neighbour_reports=REFERENCES[::-1], per_report=True, **drawn,
    )  # fmt: skip
    predicted, truth = RULES(HYPOTHESES), RULES(REFERENCES)
    scores["clinical"] = score_policies(predicted, truth, groups=groups, **drawn)
    for name, one in scores["baselines"].items():
        texts = REFERENCES[::-1] if name == "nearest_neighbour" else [one["report"]] * 7
        one["clinical"] = score_policies(RULES(texts), truth)
    scores["sides"] = score_sides(HYPOTHESES, REFERENCES, **drawn)
    scores["comparisons"] = score_comparisons(HYPOTHESES, REFERENCES, **drawn)
    scores |= {"extra": {}, "unreadable": []}
    result = Evaluation(
        scores, studies.ids(), HYPOTHESES, REFERENCES, indices=list(range(7)),
        predicted=predicted, truth=truth, per_report=scores.pop("per_report"),
    )  # fmt: skip
    return result, studies


def looked(images: Tensor, report: str) -> list[SentenceMap]:
    """An attention map a sentence: sentence k looked at patch k alone."""
    assert images.shape[1:] == (3, 32, 32)
    found = []
    for k, sentence in enumerate(s for s in report.split(" .") if s.strip()):
        grid = np.zeros((1, 4, 4))
        grid[0, k // 4 % 4, k % 4] = 1
        found.append(SentenceMap(sentence.strip(), grid, np.zeros(1)))
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("page")
    result, studies = evaluated(folder)
    path = folder / "new" / "report.html"
    synthetic = write_result_page(
        path, result, studies, title=HARM, columns=COLUMNS, count=7, maps=looked
    )
    return Written(path, result, studies, synthetic)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


class Reader(HTMLParser):
    """Elements with their attributes, and the text of table cells by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)


def test_nothing_is_fetched_and_all_is_inside(page: Written) -> None:
    reader = Reader(page.path.read_text(encoding="utf-8"))
    for tag, attributes in reader.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, value)
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert "link" not in [tag for tag, _ in reader.elements]
    css = Path(write_result_page.__code__.co_filename).parent / "templates/result_page.css"
    assert "url(" not in css.read_text() and "@import" not in css.read_text()
    policy = next(a["content"] for _, a in reader.elements if "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


def test_pictures_are_whole_and_of_bounded_size(page: Written) -> None:
    reader = Reader(page.path.read_text(encoding="utf-8"))
    sources = [str(a["src"]) for tag, a in reader.elements if tag == "img" and "src" in a]
    assert len(sources) == sum(len(record.images) for record in page.studies.records)
    sizes = []
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as picture:
            sizes.append(picture.size)
    told = [(int(str(a["width"])), int(str(a["height"])))
            for tag, a in reader.elements if tag == "img" and "src" in a]  # fmt: skip
    assert told == sizes  # the place is kept before a picture is drawn
    assert sizes[0] == (60, 40)  # its own proportions, not a square
    assert sizes[1] == (373, 480) and len(set(sizes)) == 2


def test_tables_say_what_the_scores_say(page: Written) -> None:
    reader = Reader(page.path.read_text(encoding="utf-8"))
    scores = page.result.scores
    for name, shown in (("BLEU_4", "BLEU-4"), ("CIDEr", "CIDEr")):
        low, high = scores["intervals"][name]
        baselines = [scores["baselines"][b][name]
                     for b in ("constant", "most_frequent", "nearest_neighbour")]  # fmt: skip
        expected = [f"{scores[name]:.3f}", "", f"{low:.3f} to {high:.3f}"]
        assert reader.row(shown) == [*expected, *(f"{x:.3f}" for x in baselines)]
    assert reader.row("METEOR")[0] == "–"
    f1 = scores["clinical"]["five"]["macro"]["f1"]
    assert reader.row("F1 macro, the usual 5")[0] == f"{f1:.3f}"
    one = scores["clinical"]["observations"]["Pleural Effusion"]
    counts = [one[k] for k in ("support", "predicted", "tp", "fn", "fp")]
    assert (
        reader.row("Pleural Effusion")[:5] == [str(n) for n in counts] == ["1", "2", "1", "0", "1"]
    )
    women = scores["groups"]["sex"]["F"]
    assert reader.row("F")[:2] == ["4", f"{women['BLEU_4']:.3f}"]


@pytest.mark.parametrize("uncertain", ["negative", "positive", "ignore"])
def test_findings_of_a_study_add_up_to_the_scores(uncertain: Any) -> None:
    predicted, truth = RULES(HYPOTHESES), RULES(REFERENCES)
    each = score_labels(predicted, truth, uncertain=uncertain)["observations"]
    found = [compare_findings(p, t, uncertain) for p, t in zip(predicted, truth, strict=True)]
    for k, count in enumerate(("tp", "fn", "fp")):
        named = Counter(name for lists in found for name in lists[k])
        assert named == {name: each[name][count] for name in FINDINGS if each[name][count]}


def test_histogram_holds_every_study() -> None:
    drawn = histogram("CIDEr", [0.0, 0.1, 2.0, 2.5, 3.0])
    assert drawn["top"] == 3 and drawn["median"] == 2.0
    assert [bar["count"] for bar in drawn["bars"]] == [2, *[0] * 11, 0, 1, 0, 0, 1, 0, 0, 1]
    assert max(bar["height"] for bar in drawn["bars"]) == 100


def test_best_worst_and_random_cases() -> None:
    f1 = [0.5, 0.0, 1.0, 0.5, 1.0, 0.0, 0.2, 0.3, 0.9, 0.8]
    rouge = [0.1, 0.2, 0.3, 0.4, 0.5, 0.1, 0.7, 0.8, 0.9, 1.0]
    values = {"finding F1": f1, "ROUGE-L": rouge}
    kinds = choose_cases(values, 7)
    assert len(kinds) == 7
    assert {i for i, k in kinds.items() if "best" in k} == {4, 2}
    assert {i for i, k in kinds.items() if "worst" in k} == {5, 1}
    assert all(kinds.values()) and choose_cases(values, 7) == kinds
    everything = choose_cases(values, 100)
    assert sorted(everything) == list(range(10))
    assert [i for i in sorted(everything) if "best" in everything[i]] == [2, 4, 8]
    assert choose_cases({"finding F1": [1.0], "ROUGE-L": [1.0]}, 5)[0] == ["best", "random"]
    # The draw does not look at the scores: it is the same whatever they are.
    draws = [{i for i, k in choose_cases({"finding F1": x, "ROUGE-L": rouge}, 10).items()
              if "random" in k} for x in (f1, f1[::-1])]  # fmt: skip
    assert draws[0] == draws[1] and len(draws[0]) == 3


def pieces(text: str, other: str) -> list[tuple[str, str, str]]:
    return [(p.text, p.kind, p.beside) for s in mark_report(text, other, "other") for p in s.pieces]


@pytest.mark.parametrize(
    ("text", "other", "phrase", "kind"),
    [
        ("pleural effusion .", "small effusion .", "effusion", "agree"),
        ("pleural effusion .", "no edema .", "effusion", "alone"),
        ("no edema .", "mild edema .", "edema", "against"),
        ("no edema .", "clear .", "edema", "denied"),
        ("unchanged heart .", "heart .", "unchanged", "comparison"),
        ("possible pneumonia .", "pneumonia .", "pneumonia", "agree"),
    ],
)
def test_findings_are_marked(text: str, other: str, phrase: str, kind: str) -> None:
    marked = [(t, k) for t, k, _ in pieces(text, other) if k]
    assert "".join(t for t, k in marked if k == kind) == phrase
    assert {k for _, k in marked} == {kind}
    note = next(p.note for s in mark_report(text, other, "other") for p in s.pieces if p.note)
    assert kind == "comparison" or "other: " in note


def test_differences_are_those_of_the_nearest_sentence() -> None:
    text = "small left effusion is seen . heart is large . bones are fine ."
    other = "heart is large . small right effusion is seen ."
    states = {t.strip(): b for t, _, b in pieces(text, other)}
    assert states["left"] == "differs"
    assert states["bones are fine"] == "new"
    shared = " ".join("".join(t for t, _, b in pieces(text, other) if not b).split())
    assert shared == "small effusion is seen . heart is large . ."


@pytest.mark.parametrize("text", [*REFERENCES, "", "  \n\n- one.\n- two", "a..b . . c" * 200])
def test_no_word_is_lost_by_marking(text: str) -> None:
    maps = [(s.strip(), "data:") for s in text.split(" .") if s.strip()]
    stretches = mark_report(text, HYPOTHESES[1], "other", maps)
    assert "".join(p.text for s in stretches for p in s.pieces) == tidy(text)
    assert [s for s in stretches if s.map] or not maps or "\n" in text


def test_who_may_see_it_is_said(page: Written, tmp_path: Path) -> None:
    assert not page.synthetic and "Patient data." in page.path.read_text(encoding="utf-8")
    result, studies = evaluated(tmp_path, synthetic=True)
    drawn = tmp_path / "drawn.html"
    assert write_result_page(drawn, result, studies, title="half a \ud800", count=3)
    text = drawn.read_text(encoding="utf-8")
    assert "Patient data" not in text and "there is no patient in it" in text
    assert text.count("<article") == 3 and text.count('class="tag">synthetic') == 3
    assert 'data-map="' not in text
    studies.records[3] = dataclasses.replace(studies.records[3], attributes={"sex": "F"})
    assert not is_synthetic(studies)  # one is enough
    phantoms = PhantomStudies("test", 2, domain="target", size=32, seed=0)
    assert is_synthetic(phantoms)


def test_a_report_too_long_for_a_map_has_none(tmp_path: Path) -> None:
    def refuse(images: Tensor, report: str) -> list[SentenceMap]:
        if report == HYPOTHESES[1]:
            raise InputError("longer than the decoder's positions")
        return looked(images, report)

    result, studies = evaluated(tmp_path)
    path = tmp_path / "page.html"
    write_result_page(path, result, studies, title="page", count=7, maps=refuse)
    articles = path.read_text(encoding="utf-8").split("<article")[1:]
    assert ["data-map=" in text for text in articles] == [i != 1 for i in range(7)]


def visible(browser: Browser) -> list[int]:
    """The studies that are to be seen, by number."""
    script = (
        "[...document.querySelectorAll('.study')].filter(a => a.checkVisibility()).map(a => a.id)"
    )
    return [int(name.removeprefix("study-")) for name in browser.run(script)]


def listed(browser: Browser) -> list[int]:
    """The studies of the list, in its order."""
    script = """[...document.querySelectorAll('#list button')].filter(b => b.checkVisibility())
        .map(b => b.dataset.study)"""
    return [int(name.removeprefix("study-")) for name in browser.run(script)]


def choose(browser: Browser, name: str, value: str) -> None:
    """Set a field as its user does."""
    browser.run(
        f"{{ const field = document.querySelector({json.dumps(name)});"
        f"field.value = {json.dumps(value)};"
        "if (field.value !== " + json.dumps(value) + ") throw Error('no such option');"
        "field.dispatchEvent(new Event('input', {bubbles: true})); }"
    )


@NEEDS_BROWSER
def test_what_the_data_says_is_text_and_no_more(page: Written, browser: Browser) -> None:
    browser.open(page.path)
    assert browser.run("typeof harm") == "undefined"
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
    assert browser.run("document.querySelector('h1').textContent") == HARM
    assert browser.run("document.querySelector('#study-4 .id').textContent") == f"study 4{HARM}"
    report = browser.run("document.querySelectorAll('#study-4 .report')[1].textContent")
    assert report.strip() == tidy(HYPOTHESES[4])
    browser.press("End", "Home", "a")
    urls: set[str] = set()
    for _ in range(100):  # pictures are asked for when the browser comes to it
        sent = [e for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
        urls = {e["params"]["request"]["url"].split(":")[0] for e in sent}
        if "data" in urls:
            break
        time.sleep(0.05)
        browser.run("0")
    assert urls == {"file", "data"}
    wrong = [e for e in browser.events
             if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]  # fmt: skip
    assert not wrong
    # And if a text did get in as markup: nothing that is not the page's own runs.
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"harm = 3\">')")
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("typeof harm") == "undefined"


@NEEDS_BROWSER
def test_keys(page: Written, browser: Browser) -> None:
    browser.open(page.path)
    assert visible(browser) == [0]
    for keys, expected in (
        (["ArrowRight"], 1), (["j", "j"], 3), (["ArrowLeft"], 2), (["k"], 1), (["End"], 6),
        (["ArrowRight"], 6), (["Home"], 0), (["k"], 0),
    ):  # fmt: skip
        browser.press(*keys)
        assert visible(browser) == [expected], keys
        assert browser.run("document.getElementById('count').textContent") == (
            f"Study {expected + 1} of 7"
        )
        current = browser.run("document.querySelector('[aria-current=true]').dataset.study")
        assert current == f"study-{expected}"
    browser.press("j")
    assert browser.run("location.hash") == "#study-1"
    browser.press("/", "j")  # a letter in the search field is a letter
    assert browser.run("document.activeElement.id") == "search"
    assert browser.run("document.getElementById('search').value") == "j"
    assert visible(browser) == []
    assert browser.run("document.getElementById('nothing').checkVisibility()")
    browser.press("Escape")
    assert browser.run("document.activeElement === document.body")
    for key, name in (("f", "plain-findings"), ("d", "plain-differences")):
        for on in (True, False):
            browser.press(key)
            assert browser.run(f"document.body.classList.contains('{name}')") is on
    browser.press("?")
    assert browser.run("document.getElementById('help').open")
    browser.press("Escape")
    assert not browser.run("document.getElementById('help').open")


@NEEDS_BROWSER
def test_filters_and_orders(page: Written, browser: Browser) -> None:
    browser.open(page.path)
    predicted, truth = page.result.predicted, page.result.truth

    def studies_with(name: str, said: bool, true: bool) -> list[int]:
        return [i for i in range(7)
                if (predicted[i][name] == 1) == said and (truth[i][name] == 1) == true]  # fmt: skip

    effusion = {"right": (True, True), "missed": (False, True), "invented": (True, False)}
    everywhere = []
    choose(browser, "#finding", "Pleural Effusion")
    for status, (said, true) in effusion.items():
        choose(browser, "#status", status)
        assert listed(browser) == studies_with("Pleural Effusion", said, true)
        everywhere += listed(browser)
    choose(browser, "#status", "")
    assert listed(browser) == sorted(everywhere) == [1, 6]
    assert visible(browser) == [6]  # which was there, and still passes
    browser.press("k")
    assert visible(browser) == [1]
    browser.press("j", "j")  # not beyond what is filtered
    assert visible(browser) == [6]
    browser.run("document.querySelector('#filters [type=reset]').click()")
    browser.run("new Promise(done => setTimeout(done, 50))")
    assert listed(browser) == list(range(7))
    for field, value, expected in (
        ("#error", "side", [1]), ("#error", "comparison", [3]), ("#search", "BASILAR  atel", [3]),
        ("#search", "study 5", [5]), ("[data-column='0'].group", "M", [1, 3, 5]),
        ("[data-column='1'].group", HARM, [4]), ("#kind", "best", [0, 4]),
        ("#status", "missed", [2, 6]),
    ):  # fmt: skip
        choose(browser, field, value)
        assert listed(browser) == expected, (field, value)
        choose(browser, field, "")
    rouge = page.result.per_report["ROUGE_L"]
    names = browser.run("[...document.querySelectorAll('#order option')].map(o => o.textContent)")
    assert names[3:5] == ["ROUGE-L, lowest first", "ROUGE-L, highest first"]
    choose(browser, "#order", "1 up")
    assert listed(browser) == sorted(range(7), key=lambda i: rouge[i])
    choose(browser, "#order", "1 down")
    assert listed(browser) == sorted(range(7), key=lambda i: -rouge[i])
    browser.run("document.querySelectorAll('#list button')[2].click()")
    assert visible(browser) == [listed(browser)[2]]


@NEEDS_BROWSER
def test_attention_lies_over_the_pictures(page: Written, browser: Browser) -> None:
    browser.open(page.path)
    browser.press("j")  # a study of two views
    state = """(() => { const article = document.querySelector('#study-1');
        return {maps: [...article.querySelectorAll('.map')].map(m => m.hidden ? null : m.src),
          boxes: [...article.querySelectorAll('.picture')].map(p => [...p.querySelectorAll('img')]
            .map(i => { const r = i.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]
            .map(Math.round) })),
          pressed: [...article.querySelectorAll('.sentence')].map(s => s.ariaPressed)}})()"""
    assert browser.run(state)["maps"] == [None, None]
    for k in range(2):
        browser.press("a")
        seen = browser.run(state)
        assert seen["pressed"] == [str(i == k).lower() for i in range(2)]
        assert seen["maps"][0] == seen["maps"][1]
        source = base64.b64decode(seen["maps"][0].split(",", 1)[1])
        with Image.open(io.BytesIO(source)) as picture:
            pixels = np.asarray(picture).astype(int)
        assert pixels.shape == (4, 4, 4)
        assert np.argwhere(pixels[..., :3].sum(-1) > 300).tolist() == [[0, k]]
        assert pixels[0, k, 3] > pixels[3, 3, 3] + 100  # the more, the less transparent
        for picture, overlay in seen["boxes"]:
            assert picture == overlay and min(picture) > 0
    browser.press("a")
    assert browser.run(state)["maps"] == [None, None]
    browser.run("document.querySelector('#study-1 .sentence').focus()")
    browser.press("Enter")
    assert browser.run(state)["pressed"] == ["true", "false"]
    browser.press("Escape")
    assert browser.run(state)["maps"] == [None, None]
    before = browser.run(state)["boxes"][0][0][2]
    browser.press("z")
    assert browser.run(state)["boxes"][0][0][2] > before


@NEEDS_BROWSER
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_readable_at_every_width(page: Written, browser: Browser, width: int) -> None:
    browser.open(page.path, width, 800)
    assert browser.run("document.documentElement.scrollWidth") == width
    columns = browser.run("[...document.querySelectorAll('#study-0 .reports section')]"
                          ".map(s => s.getBoundingClientRect().x)")  # fmt: skip
    assert (columns[0] == columns[1]) == (width < 600)
    small = browser.run("""[...document.querySelectorAll('button, select, input[type=search]')]
        .filter(b => b.checkVisibility() && !b.matches('.picture') && b.offsetHeight < 36)
        .map(b => b.textContent)""")
    assert not small
    font = browser.run("parseFloat(getComputedStyle(document.querySelector('.report')).fontSize)")
    assert font >= 16
    bar = browser.run("document.querySelector('.steps').getBoundingClientRect().bottom")
    assert width > 600 or bar == 800  # the two buttons stay at the thumb


@NEEDS_BROWSER
def test_all_can_use_it(page: Written, browser: Browser) -> None:
    """Names of fields and pictures, an outline where the focus is, and enough contrast."""
    browser.open(page.path)
    unnamed = browser.run("""[...document.querySelectorAll('input, select')]
        .filter(f => !f.labels.length || !f.labels[0].textContent.trim()).map(f => f.id)""")
    assert not unnamed
    assert not browser.run(
        "[...document.querySelectorAll('img')].filter(i => !i.hasAttribute('alt')).length"
    )
    assert browser.run("document.documentElement.lang") == "en"
    browser.press("Tab")
    assert browser.run("document.activeElement.textContent") == "Skip to the studies"
    browser.press("Tab", "Tab")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("a")
    faint = browser.run("""(() => {
      const numbers = (c) => c.match(/[\\d.]+/g).map(Number);
      const light = (c) => { const [r, g, b] = c.map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const ground = (e) => { for (; e; e = e.parentElement) {
        const c = numbers(getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] === 1) return c; }
        return [255, 255, 255]; };
      const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      const found = new Set();
      while (walk.nextNode()) {
        const e = walk.currentNode.parentElement;
        if (!walk.currentNode.textContent.trim() || !e.checkVisibility()) continue;
        if (e.closest('script, option, :disabled')) continue;
        const [a, b] = [light(numbers(getComputedStyle(e).color)), light(ground(e))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) found.add(`${e.tagName}.${e.className}: ${ratio.toFixed(2)}`);
      }
      return [...found];
    })()""")
    assert not faint


@NEEDS_BROWSER
def test_without_scripts_everything_is_there(page: Written, browser: Browser) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page.path)
        assert visible(browser) == list(range(7))
        assert not browser.run("document.getElementById('filters').checkVisibility()")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
