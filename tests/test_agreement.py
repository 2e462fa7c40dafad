"""`python -m emrrg.agreement`: files of annotators to a table, with the guideline they had."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score

from emrrg import agreement
from emrrg.errors import InputError
from emrrg.metrics.agreement import krippendorff_alpha

IDS = [f"s{i}" for i in range(12)]
FIRST = [1, 0, -1, 1, 0, 0, 1, 1, 0, -1, 0, 1]
SECOND = [1, 0, 1, 1, 0, -1, 1, 0, 0, -1, 0, 1]
RANK = {0: 0, -1: 1, 1: 2}


def write(path: Path, labels: list[int], ids: list[str] | None = IDS) -> str:
    names = ["Edema", "Pneumonia"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(["study_id"] if ids else []), *names])
        for i, value in enumerate(labels):
            writer.writerow([*([ids[i]] if ids else []), value, "" if value < 0 else 1 - value])
    return str(path)


def run(*words: Any, output: Path) -> dict[str, Any]:
    assert agreement.main([*map(str, words), "--bootstrap", "50", "--output", str(output)]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def test_two_files_and_a_guideline(tmp_path: Path, capsys: Any) -> None:
    first = write(tmp_path / "anna.csv", FIRST)
    second = write(tmp_path / "ben.csv", SECOND[::-1], IDS[::-1])  # ids, not the order, decide
    guideline = tmp_path / "guideline.txt"
    guideline.write_text("Mark edema where vessels are indistinct.\n")
    found = run(first, second, "--guideline", guideline, output=tmp_path / "o.json")
    edema = found["observations"]["Edema"]
    assert list(found["observations"]) == ["Edema", "Pneumonia"]
    assert edema["cohen"]["value"] == pytest.approx(cohen_kappa_score(FIRST, SECOND))
    ranks = [[RANK[a], RANK[b]] for a, b in zip(FIRST, SECOND, strict=True)]
    linear = cohen_kappa_score(*zip(*ranks, strict=True), weights="linear")
    assert edema["cohen_linear"]["value"] == pytest.approx(linear)
    ordinal = krippendorff_alpha(ranks, metric="ordinal")
    assert edema["alpha_ordinal"]["value"] == pytest.approx(ordinal)
    assert edema["cohen"]["interval"][0] < edema["cohen"]["value"]
    assert found["pooled"]["items"] == 24 and found["studies"] == 12
    assert found["guideline"].startswith("Mark edema")
    printed = capsys.readouterr().out
    assert f"| Edema | 12 | 41.7% | 41.7% | 75.0% | {edema['cohen']['value']:.3f} (" in printed
    assert "| **pooled** | 24 |" in printed
    assert printed.index("Guideline that the annotators worked from") < printed.index("Mark edema")


def test_more_files_studies_that_only_some_have_and_our_labeler(
    tmp_path: Path, capsys: Any
) -> None:
    a, b = write(tmp_path / "a.csv", FIRST), write(tmp_path / "b.csv", SECOND[:10], IDS[:10])
    c = write(tmp_path / "c.csv", [*FIRST[:9], 1], [*IDS[:9], "only here"])
    found = run(a, b, c, output=tmp_path / "o.json")
    assert found["sources"] == ["a", "b", "c"]
    assert "c: 1 studies that no other source has are left out" in capsys.readouterr().out
    edema = found["observations"]["Edema"]
    assert (edema["items"], edema["complete"]) == (10, 9)
    both = cohen_kappa_score(FIRST[:10], SECOND[:10])
    assert edema["pairs"]["a / b"]["value"] == pytest.approx(both)
    assert edema["pairs"]["a / c"]["value"] == pytest.approx(1)
    reports = tmp_path / "reports.json"
    texts = {1: "Pulmonary edema.", 0: "No edema.", -1: "Possible edema."}
    reports.write_text(json.dumps({i: texts[v] for i, v in zip(IDS, FIRST, strict=True)}))
    ours = run(a, "--reports", reports, "--observations", "Edema", output=tmp_path / "p.json")
    assert list(ours["observations"]) == ["Edema"]
    assert ours["pooled"]["cohen"]["value"] == pytest.approx(1)


def test_files_without_ids_go_by_order(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.csv", FIRST, None), write(tmp_path / "b.csv", SECOND, None)
    found = run(a, b, "--blank", "missing", output=tmp_path / "o.json")
    kappa = cohen_kappa_score(FIRST, SECOND)
    assert found["observations"]["Edema"]["cohen"]["value"] == pytest.approx(kappa)
    assert found["observations"]["Pneumonia"]["items"] == 9  # those that both marked


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["a.csv"], "at least two files"),
        (["a.csv", "short.csv"], "12 records; without ids|equally many"),
        (["a.csv", "none.csv"], "none.csv: no such file"),
        (["a.csv", "text.csv"], "name of an observation"),
        (["a.csv", "other.csv"], "no study is in two of the files"),
        (["a.csv", "bad.csv"], "bad.csv: record s0: label 'Edema': '7'"),
        (["a.csv", "a.csv", "--observations", "Oedema"], "'Oedema' is not one of"),
        (["a.csv", "a.csv", "--guideline", "none.txt"], "--guideline: none.txt"),
        (["a.csv", "a.csv", "--bootstrap", "-1"], "bootstrap"),
    ],
)
def test_errors_say_what_is_wrong(
    flags: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.csv", FIRST)
    write(tmp_path / "short.csv", FIRST[:3], None)
    write(tmp_path / "other.csv", FIRST, [f"t{i}" for i in range(12)])
    write(tmp_path / "bad.csv", [7, *FIRST[1:]])
    (tmp_path / "text.csv").write_text("study_id,report\ns1,clear\n")
    with pytest.raises(InputError, match=word):
        agreement.main(flags)
