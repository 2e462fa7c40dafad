"""METEOR 1.5 and the PTB tokenizer: the two Java programs that pycocoevalcap brings.

pycocoevalcap's wrappers wait for ever when a line is not understood (a newline inside a report is
enough) and the tokenizer's writes into the installed package. Here the same jars get the same
arguments, but every text is one line, the process has a deadline, and it is ended in any case.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

METEOR_JAR = "meteor-1.5.jar"
# METEOR 1.5, English, its default task: `-l en` sets these (Denkowski and Lavie 2014, table 1).
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.20, 0.60, 0.75
_MODULE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
_STATISTICS = 23


class JavaError(RuntimeError):
    """A Java program is not there, failed, or ran past its deadline."""


@dataclass(frozen=True)
class Meteor:
    """METEOR of one set of hypotheses.

    Attributes:
        score: of the whole set, from its summed statistics, as METEOR defines it.
        segments: (n,) fp64, of each pair alone.
        statistics: (n, 23) fp64, METEOR's counts of each pair, which may be summed.
    """

    score: float
    segments: NDArray[np.float64]
    statistics: NDArray[np.float64]


def meteor(
    sets: Sequence[tuple[Sequence[str], Sequence[str]]], *, timeout: float | None = None
) -> list[Meteor]:
    """METEOR of several sets of pairs, with one start of Java (seconds, most of it a table).

    Args:
        sets: hypotheses and references of each set, equally many, at least one.
        timeout: seconds after which the process is killed; None: 120 plus 0.2 a pair.
    Returns:
        One result a set.
    Raises:
        JavaError: no Java, a failure, or the deadline.
    """
    pairs = dict.fromkeys(
        (one_line(hypothesis), one_line(reference))
        for hypotheses, references in sets
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    )
    limit = 120 + 0.2 * len(pairs) if timeout is None else timeout
    results = []
    with _started.pop() if _started else _start_meteor() as talk:
        talk.limit(limit)
        counted = {
            (hypothesis, reference): talk.ask(f"SCORE ||| {reference} ||| {hypothesis}")
            for hypothesis, reference in pairs
        }
        for hypotheses, references in sets:
            lines = [
                counted[one_line(h), one_line(r)]
                for h, r in zip(hypotheses, references, strict=True)
            ]
            talk.say(" ||| ".join(["EVAL", *lines]))
            segments = np.array([_number(talk.hear()) for _ in lines])
            score = _number(talk.hear())
            statistics = np.array([[_number(x) for x in line.split()] for line in lines])
            if statistics.shape != (len(lines), _STATISTICS):
                raise JavaError(f"METEOR answered counts of shape {statistics.shape}")
            # A pair matched whole in one chunk has no penalty: METEOR sums no chunk for it.
            whole = (statistics[:, 20] == 1) & np.all(
                statistics[:, 21:] == statistics[:, :2], axis=1
            )
            statistics[whole, 20] = 0
            results.append(Meteor(score, segments, statistics))
    return results


@contextmanager
def meteor_ahead(wanted: bool = True) -> Iterator[None]:
    """Start METEOR's program now, for the first `meteor` within.

    Its start, of seconds, then passes beside something else. Where one waits already, or none can
    be started, nothing happens: `meteor` tries once more and says why.

    Args:
        wanted: False: nothing happens either.
    """
    program = None
    if wanted and not _started:
        with contextlib.suppress(JavaError, OSError):
            program = _start_meteor()
            _started.append(program)
    try:
        yield
    finally:
        if program in _started:
            _started.remove(program)
            program.end()


_started: list[_Conversation] = []  # nobody talks to them yet


def _start_meteor() -> _Conversation:
    command = [java(), "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", METEOR_JAR, "-", "-", "-stdio"]
    return _Conversation([*command, "-l", "en", "-norm"], _package("meteor"))


def meteor_score(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """METEOR from summed statistics: Denkowski and Lavie 2014, equations 1 to 5.

        P = sum_i w_i (delta m_i(h_c) + (1 - delta) m_i(h_f)) / (delta |h_c| + (1 - delta) |h_f|)
        F = P R / (alpha P + (1 - alpha) R);  score = F (1 - gamma (chunks / matches)^beta)

    Used for resampling only; the tests hold it to what the Java program answers.

    Args:
        sums: (r, 23) fp64, sums of `Meteor.statistics` over studies.
    Returns:
        (r,) fp64; 0 where nothing matches.
    """
    length, function_words = sums[:, 0:2], sums[:, 2:4]  # of hypotheses and references
    matches = sums[:, 4:20].reshape(-1, 4, 4)  # module; content h, content r, function h, r
    content = np.einsum("rmk,m->rk", matches[:, :, 0:2], _MODULE_WEIGHTS)
    function = np.einsum("rmk,m->rk", matches[:, :, 2:4], _MODULE_WEIGHTS)
    weight = _DELTA * (length - function_words) + (1 - _DELTA) * function_words
    found = _DELTA * content + (1 - _DELTA) * function
    precision, recall = np.divide(found, weight, out=np.zeros_like(found), where=weight > 0).T
    below = _ALPHA * precision + (1 - _ALPHA) * recall
    mean = np.divide(precision * recall, below, out=np.zeros_like(below), where=below > 0)
    chunks, matched = sums[:, 20], sums[:, 21:23].mean(1)
    fragments = np.divide(chunks, matched, out=np.zeros_like(chunks), where=matched > 0)
    return mean * (1 - _GAMMA * fragments**_BETA)


def ptb_tokenize(texts: Sequence[str], *, timeout: float | None = None) -> list[str]:
    """Lower-case Penn Treebank tokens without punctuation, as COCO captions are scored.

    Args:
        texts: any; white space is collapsed.
        timeout: seconds; None: 120 plus 0.02 a text.
    Raises:
        JavaError: no Java, a failure, or the deadline.
    """
    tokenizer = "edu.stanford.nlp.process.PTBTokenizer"
    command = [java(), "-Dfile.encoding=UTF-8", "-cp", STANFORD_CORENLP_3_4_1_JAR, tokenizer]
    try:
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase"],
            cwd=_package("tokenizer"),
            input="".join(one_line(text) + "\n" for text in texts),
            capture_output=True,
            encoding="utf-8",
            timeout=120 + 0.02 * len(texts) if timeout is None else timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise JavaError(f"the PTB tokenizer was ended after {error.timeout:.0f} s") from None
    lines = done.stdout.split("\n")[: len(texts)]
    if done.returncode or len(lines) != len(texts):
        raise JavaError(f"the PTB tokenizer failed: {_last_line(done.stderr)}")
    drop = set(PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in drop) for line in lines]


def java() -> str:
    """Path of the Java program.

    Raises:
        JavaError: there is none.
    """
    path = shutil.which("java")
    if path is None:
        raise JavaError("no Java on the PATH (install a Java runtime, version 8 or later)")
    return path


def one_line(text: str) -> str:
    """The text as METEOR's line protocol can carry it: single blanks, no field separator, and
    nothing that UTF-8 cannot hold (half a pair of surrogates)."""
    return " ".join(text.encode("utf-8", "replace").decode().replace("|||", " ").split())


class _Conversation:
    """Lines to a process and lines back, until a deadline, after which it is killed."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in end
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us: we end it, or finish what it is needed for
        )
        self._late: str | None = None
        self._timer: threading.Timer | None = None

    def limit(self, seconds: float) -> None:
        """Set the deadline."""

        def stop() -> None:
            self._late = f"METEOR was ended after {seconds:.0f} s"
            self._process.kill()

        self._timer = threading.Timer(seconds, stop)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> _Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._timer is not None:
            self._timer.cancel()
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            _close(pipe)
        self._process.wait()
        self._errors.close()

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure() from None

    def hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return line.strip()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()

    def _failure(self) -> JavaError:
        if self._late is not None:
            return JavaError(self._late)
        self._process.wait()
        self._errors.seek(0)
        return JavaError(
            f"METEOR failed: {_last_line(self._errors.read().decode(errors='replace'))}"
        )


def _close(pipe: IO[str] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:  # unwritten lines to a process that is gone
        pass


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise JavaError(f"METEOR answered {text[:80]!r} where a number was due") from None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(f"pycocoevalcap.{name}")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))
