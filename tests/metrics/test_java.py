"""METEOR and the PTB tokenizer: equal to pycocoevalcap's own, and never left running."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.meteor.meteor import Meteor as TheirMeteor
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from emrrg.metrics import java
from emrrg.metrics.java import JavaError, Meteor, meteor, meteor_score, one_line, ptb_tokenize

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java on the PATH")

REFERENCES = [
    "the heart is normal in size . no pleural effusion or pneumothorax .",
    "mild cardiomegaly . the lungs are clear .",
    "small right pleural effusion with adjacent atelectasis .",
    "no acute disease .",
    "the lungs are clear .",
]
HYPOTHESES = [
    "heart size is normal . there is no effusion .",
    "the heart is mildly enlarged . lungs are clear .",
    "left basilar consolidations .",
    "no acute disease .",
    "",
]


# What broke the program's line protocol: newlines, its separator, half a character.
WILD = ["no\npleural\u2028effusion", "the lungs ||| mild", "heart \ud83d\x00 normal", "\t"]
PLAIN = ["no pleural effusion", "the lungs mild", one_line("heart \ud83d\x00 normal"), ""]


@pytest.fixture(scope="module")
def scored() -> list[Meteor]:
    """One start of Java, which is slow, for several sets of pairs."""
    sets = [(HYPOTHESES, REFERENCES), (HYPOTHESES[:1], REFERENCES[:1])]
    return meteor([*sets, (WILD, REFERENCES[:4]), (PLAIN, REFERENCES[:4])])


@needs_java
def test_meteor_equals_pycocoevalcap(scored: list[Meteor]) -> None:
    theirs = TheirMeteor()  # starts Java as well
    ids = range(len(REFERENCES))
    expected, each = theirs.compute_score(
        {i: [REFERENCES[i]] for i in ids}, {i: [HYPOTHESES[i]] for i in ids}
    )
    theirs.meteor_p.kill()
    for pipe in (theirs.meteor_p.stdin, theirs.meteor_p.stdout, theirs.meteor_p.stderr):
        pipe.close()
    theirs.meteor_p.wait()
    assert scored[0].score == expected
    np.testing.assert_array_equal(scored[0].segments, each)
    assert scored[1].score == scored[1].segments[0] == each[0]


@needs_java
def test_score_from_summed_statistics_equals_the_programs(scored: list[Meteor]) -> None:
    rows = scored[0].statistics
    assert rows.shape == (5, 23)
    np.testing.assert_allclose(meteor_score(rows), scored[0].segments, atol=1e-12)
    total = meteor_score(rows.sum(0, keepdims=True))
    assert total[0] == pytest.approx(scored[0].score, abs=1e-12)


@needs_java
def test_any_text_is_one_line(scored: list[Meteor]) -> None:
    np.testing.assert_array_equal(scored[2].segments, scored[3].segments)
    assert scored[2].segments[0] > 0 and scored[2].segments[1] > 0


@needs_java
def test_ptb_tokens_equal_pycocoevalcaps() -> None:
    texts = [
        'The heart isn\'t enlarged (2.5 cm); no "effusion" - seen...',
        "",
        "A/B \n C-D",
        "left > right",
    ]
    lines = [" ".join(text.split()) for text in texts]
    theirs = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    assert ptb_tokenize(texts) == [theirs[i][0] for i in range(len(texts))]


def play_java(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of our own named java first on the PATH."""
    program = folder / "java"
    program.write_text(f"#!{sys.executable}\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Java is a script")
@pytest.mark.parametrize("tool", ["meteor", "ptb"])
def test_a_program_that_never_answers_is_ended(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "pid"
    body = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    play_java(tmp_path, body, monkeypatch)
    started = time.monotonic()
    with pytest.raises(JavaError, match="was ended after 1 s"):
        if tool == "meteor":
            meteor([(["a"], ["b"])], timeout=1.0)
        else:
            ptb_tokenize(["a"], timeout=1.0)
    assert time.monotonic() - started < 30
    assert not alive(int(note.read_text()))


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Java is a script")
@pytest.mark.parametrize("used", [True, False])
def test_a_program_that_was_started_ahead_serves_once_and_is_ended(
    used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = " ".join(["1.0"] * 23)
    body = f"""
import os, sys
open({str(tmp_path / "starts")!r}, "a").write(str(os.getpid()) + "\\n")
for line in sys.stdin:
    print({counts!r} if line.startswith("SCORE") else "0.5\\n0.5", flush=True)"""
    play_java(tmp_path, body, monkeypatch)
    starts = tmp_path / "starts"
    with java.meteor_ahead(False):
        pass
    with java.meteor_ahead(), java.meteor_ahead():  # one that waits is enough
        for _ in range(600):
            if starts.exists() and starts.read_text().endswith("\n"):
                break
            time.sleep(0.05)
        if used:
            assert meteor([(["a"], ["b"])])[0].score == 0.5
            assert len(starts.read_text().split()) == 1
            assert meteor([(["a"], ["b"])])[0].score == 0.5
    pids = [int(line) for line in starts.read_text().split()]
    assert len(pids) == (2 if used else 1)
    assert not any(map(alive, pids))


def test_ahead_without_java_leaves_the_message_to_meteor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with java.meteor_ahead(), pytest.raises(JavaError, match="no Java on the PATH"):
        meteor([(["a"], ["b"])])


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Java is a script")
def test_ctrl_c_does_not_reach_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to its whole session; whoever asked for scores decides what follows."""
    play_java(tmp_path, "import os, sys; sys.exit(f'session {os.getsid(0)}')", monkeypatch)
    with pytest.raises(JavaError, match=r"session \d+") as error:
        meteor([(["a"], ["b"])])
    assert int(str(error.value).rsplit(" ", 1)[1]) != os.getsid(0)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Java is a script")
@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("import sys; sys.exit('Error: Unable to access jarfile')", "Unable to access jarfile"),
        ("raise SystemExit(1)", "it said nothing"),
        ("import sys\nfor line in sys.stdin: print('Invalid maximum heap', flush=True)",
         "where a number was due"),
        ("import sys\nfor line in sys.stdin: print('1.0 2.0', flush=True)", "a number was due"),
    ],
)  # fmt: skip
def test_a_program_that_fails_is_quoted(
    body: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_java(tmp_path, body, monkeypatch)
    with pytest.raises(JavaError, match=word):
        meteor([(["a"], ["b"])], timeout=20)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Java is a script")
def test_a_program_that_does_not_stop_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversation is over, the program is not: it does not care that nobody writes to it."""
    note = tmp_path / "pid"
    body = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid()))"
    play_java(
        tmp_path, body + "; print('nonsense\\n' * 2, flush=True); time.sleep(600)", monkeypatch
    )
    with pytest.raises(JavaError, match="where a number was due"):
        meteor([(["a"], ["b"])], timeout=60)
    assert not alive(int(note.read_text()))


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Java is a script")
def test_a_tokenizer_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_java(tmp_path, "import sys; sys.exit('no such class')", monkeypatch)
    with pytest.raises(JavaError, match="no such class"):
        ptb_tokenize(["a"])


def test_without_java_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (java.java, lambda: meteor([(["a"], ["b"])]), lambda: ptb_tokenize(["a"])):
        with pytest.raises(JavaError, match="no Java on the PATH"):
            call()
