"""`python -m emrrg.score`: every form of file, what is matched with what, and what it writes."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emrrg import score
from emrrg.errors import InputError
from emrrg.metrics import score_reports
from emrrg.metrics.clinical import OBSERVATIONS, label_report, score_labels

ROOT = Path(__file__).parents[1]

REFERENCES = {
    "s1": "Small right pleural effusion. Heart size is normal.",
    "s2": "The lungs are clear. No pneumothorax.",
    "s3": "Mild cardiomegaly. Left basilar atelectasis.",
    "s4": "Possible pneumonia in the right lower lobe.",
}
HYPOTHESES = {
    "s1": "Small left pleural effusion.\n\nHeart size is normal.",
    "s2": "The lungs are clear.",
    "s3": "Stable cardiomegaly. No pneumothorax.",
    "s4": "Right lower lobe pneumonia.",
}
IDS = list(REFERENCES)


def records(texts: dict[str, str], field: str) -> list[dict[str, Any]]:
    return [{"id": name, field: text} for name, text in texts.items()]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """An annotation file with the columns that scores are broken down by."""
    test = [
        {"id": name, "report": text, "image_path": [], "sex": "FM"[i % 2], "prior": i % 2}
        for i, (name, text) in enumerate(REFERENCES.items())
    ]
    train = [{"id": f"t{i}", "report": "The lungs are clear.", "image_path": []} for i in range(3)]
    return write_json(tmp_path / "annotation.json", {"train": train, "val": [], "test": test})


def run(*words: Any, output: Path) -> dict[str, Any]:
    flags = ["--meteor", "off", "--bootstrap", "20", "--output", output]
    assert score.main([str(word) for word in (*words, *flags)]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


BACK = dict(reversed(list(HYPOTHESES.items())))  # ids, not the order, decide


def test_every_form_of_file_gives_the_same_scores(tmp_path: Path, references: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in records(BACK, "generated"))
    forms = {
        "list.json": lambda p: write_json(p, records(BACK, "hypothesis")),
        "object.json": lambda p: write_json(p, BACK),
        "objects.json": lambda p: write_json(p, {k: {"report": v} for k, v in BACK.items()}),
        "split.json": lambda p: write_json(p, {"test": records(BACK, "report")}),
        "r2gengpt.json": lambda p: write_json(p, {k: [v] for k, v in BACK.items()}),
        "cocoeval.json": lambda p: write_json(p, {k: [{"caption": v}] for k, v in BACK.items()}),
        "coco.json": lambda p: write_json(
            p, [{"image_id": k, "caption": v} for k, v in BACK.items()]
        ),
        "texts.json": lambda p: write_json(p, list(HYPOTHESES.values())),
        "res.csv": lambda p: p.write_text(
            "".join(f'"{v}"\n' for v in HYPOTHESES.values()), encoding="utf-8"
        ),
        "lines.jsonl": lambda p: p.write_text(lines),
        "lines.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines.encode())),
        "table.csv": lambda p: write_csv(
            p, [{"study_id": k, "prediction": v} for k, v in BACK.items()]
        ),
        "other.csv": lambda p: write_csv(p, records(BACK, "output text")),
    }
    expected = score_reports(list(HYPOTHESES.values()), list(REFERENCES.values()), meteor="off")
    labels = [[label_report(x) for x in d.values()] for d in (HYPOTHESES, REFERENCES)]
    clinical = score_labels(*labels)
    for name, make in forms.items():
        make(tmp_path / name)
        more = ["--hypothesis-column", "output text"] if name == "other.csv" else []
        found = run(tmp_path / name, references, "--split", "test", *more, output=tmp_path / "o")
        for metric in ("BLEU_1", "BLEU_4", "ROUGE_L", "CIDEr", "pairs"):
            assert found[metric] == expected[metric], (name, metric)
        for part in ("all", "five", "findings", "observations"):
            assert found["clinical"][part] == clinical[part], (name, part)


def test_everything_at_once(tmp_path: Path, references: Path, capsys: Any) -> None:
    own = write_json(tmp_path / "own.json", HYPOTHESES)
    other = write_csv(tmp_path / "other.csv", records(REFERENCES, "report"))
    found = run(
        own, references, "--split", "test", "--train-reports", references, "--compare", other,
        "--by", "sex", "--prior-column", "prior", "--clean", "iu_xray", "--neighbours", other,
        "--per-report", tmp_path / "each.jsonl", output=tmp_path / "scores.json",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert found["baselines"]["constant"]["report"] == "the lungs are clear ."
    assert found["baselines"]["nearest_neighbour"]["BLEU_4"] == pytest.approx(1)
    assert found["baselines"]["constant"]["clinical"]["all"]["micro"]["recall"] == 1 / 4
    assert found["clinical"]["labeler"] == "emrrg rules 1"
    # s4: a pneumonia that the reference only suspects is no pneumonia, or one, or not counted
    policies = {k: v["findings"]["micro"] for k, v in found["clinical"]["policies"].items()}
    assert policies == pytest.approx({"negative": 4 / 6, "positive": 6 / 7, "ignore": 4 / 5})
    assert found["sides"]["wrong"] == 1 and found["sides"]["compared"] == 2
    # "Stable cardiomegaly" (s3) where there is no earlier study; s2 and s4 have one
    assert (found["comparisons"]["without_prior"], found["comparisons"]["invented"]) == (2, 1)
    assert found["groups"]["sex"]["F"]["pairs"] == 2
    assert found["clinical"]["groups"]["sex"]["M"]["studies"] == 2
    test = found["comparison"]["language"]["BLEU_4"]
    assert test["second"] == pytest.approx(1) and test["difference"] < 0
    assert found["comparison"]["clinical"]["findings"]["micro"]["f1"]["second"] == 1
    assert found["files"]["references"] == str(references) and found["clean"] == "iu_xray"
    each = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    assert [row["id"] for row in each] == IDS
    assert each[0]["hypothesis"] == "small left pleural effusion . heart size is normal ."
    assert each[0]["predicted_labels"]["Pleural Effusion"] == 1 and "BLEU_4" in each[0]
    for words in (
        "protocol full, tokenization split", "METEOR: not computed: not asked for",
        "uncertain as negative", "F1 micro, 13 findings", "wrong side: 1 of 2",
        "invented comparisons: 1 of 2", "paired bootstrap", "constant",
    ):  # fmt: skip
        assert words in printed, words


def test_one_file_may_hold_both(tmp_path: Path, references: Path) -> None:
    rows = [{"id": i, "hypothesis": HYPOTHESES[i], "reference": REFERENCES[i]} for i in IDS]
    both = run(write_json(tmp_path / "both.json", rows), output=tmp_path / "o")
    own = write_json(tmp_path / "own.json", HYPOTHESES)
    apart = run(own, references, "--split", "test", output=tmp_path / "p")
    assert both["BLEU_4"] == apart["BLEU_4"]


def test_labels_from_files(tmp_path: Path, references: Path) -> None:
    """A CSV as CheXbert writes it, and labels that the annotation itself may carry."""
    own = write_json(tmp_path / "own.json", HYPOTHESES)
    marks = {1: "1.0", 0: "0.0", -1: "-1.0", None: ""}
    rows = [
        {"id": i, **{name: marks[value] for name, value in label_report(text).items()}}
        for i, text in BACK.items()
    ]
    csv_labels = write_csv(tmp_path / "labels.csv", rows)
    json_labels = write_json(
        tmp_path / "labels.json", {i: {"labels": label_report(t)} for i, t in REFERENCES.items()}
    )
    plain = run(own, references, "--split", "test", output=tmp_path / "o")
    found = run(
        own, references, "--split", "test", "--hypothesis-labels", csv_labels,
        "--reference-labels", json_labels, output=tmp_path / "p",
    )  # fmt: skip
    for part in ("all", "five", "findings", "observations"):
        assert found["clinical"][part] == plain["clinical"][part], part
    source = f"hypotheses: file {csv_labels}; references: file {json_labels}"
    assert found["clinical"]["labeler"] == source
    none = run(own, references, "--split", "test", "--labeler", "off", output=tmp_path / "q")
    assert "clinical" not in none and none["BLEU_4"] == plain["BLEU_4"]
    assert tuple(rows[0])[1:] == OBSERVATIONS


def test_labels_without_ids_have_the_order_of_the_reports_file(tmp_path: Path) -> None:
    """As CheXbert's own script writes them: a row a report, whatever the references' order."""
    texts = {f"s{i}": ("Small effusion.", "Lungs are clear.", "Edema.")[i % 3] for i in range(6)}
    back = {"left out": "Fracture."} | dict(reversed(list(texts.items())))
    own = write_json(tmp_path / "own.json", back)
    references = write_json(tmp_path / "references.json", texts)

    def chexbert_file(name: str, reports: dict[str, str]) -> Path:
        rows = [{"Report Impression": t, **label_report(t)} for t in reports.values()]
        return write_csv(tmp_path / name, rows)

    found = run(
        own, references, "--hypothesis-labels", chexbert_file("h.csv", back),
        "--reference-labels", chexbert_file("r.csv", texts), "--compare", own,
        "--compare-labels", tmp_path / "h.csv", output=tmp_path / "o",
    )  # fmt: skip
    assert found["clinical"]["findings"]["micro"]["f1"] == 1
    assert found["comparison"]["clinical"]["findings"]["micro"]["f1"]["second"] == 1
    with pytest.raises(InputError, match=r"h\.csv has 7 records and .*references\.json 6"):
        run(own, references, "--reference-labels", tmp_path / "h.csv", output=tmp_path / "p")


def test_labels_from_a_chexbert_checkpoint(
    tmp_path: Path, references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def label(texts: list[str], checkpoint: str, vocabulary: str, **options: Any) -> Any:
        calls.append((list(texts), checkpoint, vocabulary, options))
        return [{"Edema": 1, "Pneumonia": i % 2} for i in range(len(texts))]

    monkeypatch.setattr(score, "label_reports", label)
    own = write_json(tmp_path / "own.json", BACK)
    flags = ["--labeler", "chexbert", "--chexbert", "c.pth", "--vocabulary", "v.txt"]
    found = run(own, references, "--split", "test", *flags, output=tmp_path / "o")
    assert found["clinical"]["labeler"] == "CheXbert"
    assert found["clinical"]["observations"]["Pneumonia"]["tp"] == 2
    expected = [list(REFERENCES.values()), list(HYPOTHESES.values())]
    assert calls == [(texts, "c.pth", "v.txt", {"device": "cpu"}) for texts in expected]


def test_reports_without_a_reference_are_left_out_and_named(
    tmp_path: Path, references: Path, capsys: Any
) -> None:
    more = write_json(tmp_path / "more.json", {**HYPOTHESES, "s9": "Normal."})
    found = run(more, references, "--split", "test", output=tmp_path / "o")
    assert found["pairs"] == 4
    assert "1 reports have no reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "flags", "word"),
    [
        (
            {"s1": "a", "s3": "b"},
            [],
            r"own.json: 2 of 4 references have no report in it \(s2, s4\)",
        ),
        ({"x": "a"}, [], "no id in common"),
        (["a", "b"], [], "has 2 records and .* 4"),
        ([{"id": "s1", "report": "a"}, {"id": "s1", "report": "b"}], [], "records 1 and 2 have"),
        ([{"id": "s1"}], [], "no field named hypothesis, prediction"),
        ([{"id": "s1", "report": None}], [], "record s1: report: nothing, not a text"),
        ([{"id": "", "report": "a"}], [], "record 1: no 'id'"),
        ([], [], "no study in it"),
        ("text", [], "expected a list or an object"),
        ([3], [], "record 1: int"),
        (HYPOTHESES, ["--split", "dev"], "no study of split 'dev'"),
        (HYPOTHESES, ["--id-column", "key"], "--id-column: .* no field 'key'"),
        (HYPOTHESES, ["--by", "age"], "no field 'age'"),
        (HYPOTHESES, ["--prior-column", "report"], "neither yes, no nor a number"),
        (HYPOTHESES, ["--protocol", "r2gen"], "max_tokens"),
        (HYPOTHESES, ["--labeler", "chexbert"], "needs --chexbert and --vocabulary"),
        (HYPOTHESES, ["--extra", "bleurt"], "--extra: 'bleurt'"),
        (HYPOTHESES, ["--compare", "own.json", "--bootstrap", "0"], "--compare: needs --bootstrap"),
        (HYPOTHESES, ["--compare-labels", "l.csv"], "--compare-labels: needs --compare"),
        (HYPOTHESES, ["--hypothesis-labels", "annotation.json"], "name of an observation"),
        (HYPOTHESES, ["--reference-labels", "none.csv"], "none.csv: no such file"),
    ],
)
def test_errors_say_what_is_wrong(
    content: Any, flags: list[str], word: str, tmp_path: Path, references: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "own.json", content)
    split = [] if "--split" in flags else ["--split", "test"]
    with pytest.raises(InputError, match=word):
        score.main(["own.json", str(references), "--meteor", "off", *split, *flags])


def test_a_study_that_could_not_be_written_is_missing(tmp_path: Path, references: Path) -> None:
    """The lines of `emrrg.generate --list`, one of them an error."""
    rows = [*records(HYPOTHESES, "report")[:3], {"id": "s4", "error": "a.png: broken"}]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"own\.jsonl: 1 of 4 references have no report .*\(s4\)"):
        score.main([str(own), str(references), "--split", "test", "--meteor", "off"])
    own.write_text(json.dumps(rows[3]))
    with pytest.raises(InputError, match=r"no study has a report, the first: .*a\.png: broken"):
        score.main([str(own), str(references), "--split", "test", "--meteor", "off"])


def test_what_is_no_table_is_refused_by_name(tmp_path: Path, references: Path) -> None:
    (tmp_path / "report.txt").write_text("the heart is normal\n")
    with pytest.raises(InputError) as error:
        score.main([str(tmp_path / "report.txt"), str(references)])
    assert "report.txt: only .json, .jsonl, .csv, .tsv are read; plain texts" in str(error.value)
    with pytest.raises(InputError, match=r": is a folder; give a file \(\.json, "):
        score.main([str(tmp_path)])
    own = write_json(tmp_path / "predictions.json", HYPOTHESES)
    with pytest.raises(InputError, match=rf": is a folder; give {own}"):
        score.main([str(tmp_path), str(references)])


def test_what_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write_json(tmp_path / "own.json", HYPOTHESES)
    monkeypatch.setattr(score, "score_reports", lambda *_, **__: pytest.fail("too late"))
    for flag in ("--output", "--per-report"):
        with pytest.raises(InputError, match=rf"{flag}: .*own\.json/x cannot be written"):
            score.main([str(own), str(references), "--split", "test", flag, str(own / "x")])


def test_the_command_and_its_status(tmp_path: Path, references: Path) -> None:
    own = write_json(tmp_path / "own.json", HYPOTHESES)

    def command(*words: Any) -> subprocess.CompletedProcess[str]:
        full = [sys.executable, "-m", "emrrg.score", *map(str, words), "--meteor", "off"]
        return subprocess.run(full, cwd=ROOT, capture_output=True, text=True, check=False)

    done = command(own, references, "--split", "test", "--bootstrap", "10")
    assert done.returncode == 0 and "BLEU_4" in done.stdout, done.stderr
    failed = command(tmp_path / "absent.json", references)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1 and "absent.json: no such file" in failed.stderr


def test_scores_need_neither_model_nor_transformers() -> None:
    """What the command imports, seen from outside."""
    code = (
        "import sys; import emrrg.score, emrrg.agreement; print(sorted(m for m in sys.modules if "
        "m.split('.')[0] in ('transformers', 'peft', 'timm', 'radgraph', 'kernels') or m in "
        "('emrrg.model', 'emrrg.vision', 'emrrg.decoder', 'emrrg.lora')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
