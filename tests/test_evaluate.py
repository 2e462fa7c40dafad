"""`python -m emrrg.evaluate`: whose labels, which columns, which baselines, and the result page."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from emrrg import neighbours, scoring
from emrrg.config import ModelConfig, TrainConfig, to_dict
from emrrg.data.dataset import PhantomStudies, RecordStudies
from emrrg.data.loading import load_studies
from emrrg.data.records import Record
from emrrg.decoder import DecoderConfig
from emrrg.errors import InputError
from emrrg.evaluate import main
from emrrg.metrics import score_reports
from emrrg.metrics.clinical import (
    OBSERVATIONS,
    label_report,
    score_comparisons,
    score_labels,
    score_policies,
    score_sides,
)
from emrrg.model import ReportGenerator, set_regime
from emrrg.neighbours import by_default, nearest_reports
from emrrg.runs import load_run, mark_finished, save_base, save_checkpoint, write_json
from emrrg.tokenizer import train_tokenizer

SIZE = 32
TRAIN = {
    "t0": "heart size is normal .",
    "t1": "small left pleural effusion .",
    "t2": "no pneumothorax .",
    "t3": "heart size is normal .",
}
TEST = {  # id to reference, generated report, and other fields
    "e0": ("small left pleural effusion .", "small right pleural effusion .", "F", 0, 35),
    "e1": ("heart size is normal .", "unchanged cardiomegaly .", "F", 1, 71),
    "e2": ("possible pneumonia .", "right pneumonia .", "M", 0, 8),
    "e3": ("moderate cardiomegaly .", "stable moderate cardiomegaly .", "M", None, 44),
}
REFERENCES = [one[0] for one in TEST.values()]
HYPOTHESES = [one[1] for one in TEST.values()]


def save_run(folder: Path) -> Path:
    """A run on files, with a very small model of random weights."""
    (folder / "images").mkdir(parents=True)
    run = folder / "run"
    run.mkdir()
    rng = np.random.default_rng(0)
    content: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}

    def add(split: str, name: str, report: str, pixels: Any, **fields: Any) -> None:
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        content[split].append(
            {"id": name, "report": report, "image_path": [f"{name}.png"], **fields}
        )

    pictures = rng.integers(0, 255, (4, SIZE, SIZE), dtype=np.uint8)
    for pixels, (name, report) in zip(pictures, TRAIN.items(), strict=True):
        add("train", name, report, pixels)
    # Study k of the test looks all but like study 3 - k of the training.
    for k, (name, (report, _, sex, earlier, age)) in enumerate(TEST.items()):
        near = np.clip(pictures[3 - k].astype(int) + 2, 0, 255).astype(np.uint8)
        fields = {"sex": sex, "age": age, "earlier_studies": earlier, "labels": LABELS[name]}
        add("test", name, report, near, view=["PA"], **fields)
    (folder / "annotation.json").write_text(json.dumps(content))
    tokenizer = train_tokenizer(
        [*TRAIN.values(), *REFERENCES, *HYPOTHESES] * 4, 120, run / "t.model"
    )
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, hybrid_layers=(0,),
    )  # fmt: skip
    torch.manual_seed(0)
    model = ReportGenerator(
        ModelConfig(image_size=SIZE, dim=16, depth=1, decoder=decoder.to_dict()), tokenizer
    )
    trained = set_regime(model, "linear-probe")
    weights = {n: p for n, p in model.named_parameters() if n in trained}
    save_base(run, model, trained)
    save_checkpoint(run, 1, weights, {"step": torch.ones(1)}, {"step": 1}, best=True)
    flags = TrainConfig(
        dataset="custom", annotation=str(folder / "annotation.json"), num_beams=1,
        images=str(folder / "images"), max_report_tokens=60, eval_batch_size=3,
    )  # fmt: skip
    write_json(run / "config.json", to_dict(flags))
    return run


# What the annotation says, unlike what the rules read in the texts.
LABELS = {name: dict.fromkeys(OBSERVATIONS) | {"Edema": 1, "Pneumonia": k % 3 - 1}
          for k, name in enumerate(TEST)}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    save_run(folder)
    return folder


@pytest.fixture
def evaluate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Run the command with known generated reports; its scores."""

    def write(self: Any, images: Tensor, view_mask: Tensor, generation: Any) -> list[str]:
        start = len(given)
        given.extend(HYPOTHESES[start : start + len(images)])
        return given[start:]

    given: list[str] = []
    monkeypatch.setattr(ReportGenerator, "generate_batch", write)

    def run(*flags: Any, meteor: str = "off") -> dict[str, Any]:
        given.clear()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        words = [
            folder / "run",
            "--output",
            tmp_path / "out",
            "--bootstrap",
            20,
            "--meteor",
            meteor,
        ]
        assert main([str(word) for word in (*words, *flags)]) == 0
        return json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))

    return run


def plain(value: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(value))


def rules(texts: list[str]) -> list[dict[str, int | None]]:
    return [label_report(text) for text in texts]


def test_scores_are_those_of_the_metrics(evaluate: Any, tmp_path: Path) -> None:
    got = evaluate()
    drawn: dict[str, Any] = {"bootstrap": 20, "seed": 42}
    language = score_reports(
        HYPOTHESES, REFERENCES, meteor="off", train_reports=list(TRAIN.values()), **drawn
    )
    for name in ("BLEU_1", "BLEU_4", "ROUGE_L", "CIDEr", "METEOR", "intervals", "notes"):
        assert got[name] == plain(language[name])
    assert set(got["baselines"]) == {"constant", "most_frequent", "nearest_neighbour"}
    priors = [False, True, False, None]
    comparisons = score_comparisons(HYPOTHESES, REFERENCES, has_prior=priors, **drawn)
    assert got["comparisons"] == plain(comparisons)
    assert got["comparisons"]["known"] == 3 and got["comparisons"]["invented"] == 1
    assert got["sides"] == plain(score_sides(HYPOTHESES, REFERENCES, **drawn))
    assert got["sides"]["wrong"] == 1 and got["unreadable"] == []
    own = score_policies(rules(HYPOTHESES), list(LABELS.values()), **drawn)
    assert got["clinical"]["all"] == own["all"] and got["clinical"]["policies"] == own["policies"]
    assert got["clinical"]["intervals"] == own["intervals"]
    assert got["clinical"]["labeler"] == "emrrg rules 1; references: the data set's labels"
    same = [got["baselines"]["constant"]["report"]] * 4
    constant = score_labels(rules(same), list(LABELS.values()))
    assert got["baselines"]["constant"]["clinical"]["all"] == constant["all"]
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [(p["id"], p["hypothesis"], p["reference"]) for p in predictions] == [
        (name, one[1], one[0]) for name, one in TEST.items()
    ]


@pytest.mark.parametrize("policy", ["positive", "ignore"])
def test_uncertain_labels_count_as_asked(policy: str, evaluate: Any) -> None:
    got = evaluate("--uncertain", policy)["clinical"]
    expected = score_labels(rules(HYPOTHESES), list(LABELS.values()), uncertain=policy)  # type: ignore[arg-type]
    other = score_labels(rules(HYPOTHESES), list(LABELS.values()))
    assert got["observations"] == expected["observations"] != other["observations"]
    assert got["uncertain"] == policy


def test_scores_by_columns(evaluate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    got = evaluate("--by", "sex,age,view")
    assert list(got["groups"]) == list(got["clinical"]["groups"]) == ["sex", "age", "view"]
    assert {k: v["pairs"] for k, v in got["groups"]["age"].items()} == {
        "under 18": 1, "18 to under 40": 1, "40 to under 60": 1, "60 to under 80": 1,
    }  # fmt: skip
    assert got["groups"]["view"]["PA"]["BLEU_4"] == pytest.approx(got["BLEU_4"])
    women = score_reports(HYPOTHESES[:2], REFERENCES[:2], meteor="off")
    assert got["groups"]["sex"]["F"]["BLEU_2"] == pytest.approx(women["BLEU_2"])
    clinical = score_labels(rules(HYPOTHESES[2:]), list(LABELS.values())[2:])
    assert got["clinical"]["groups"]["sex"]["M"]["all"] == clinical["all"]
    table = capsys.readouterr().out
    assert "under 18" in table and "invented comparisons" in table
    with pytest.raises(InputError, match=r"--by: no study has 'ward'; .* has .*sex, age"):
        evaluate("--by", "ward")


def test_a_column_of_too_many_values_is_refused_before_any_work() -> None:
    records = [Record(str(i), "Clear.", (), "test", None, {"ward": f"w{i}"}) for i in range(21)]
    studies = RecordStudies(records, SIZE)
    with pytest.raises(InputError, match="column 'ward': 21 different values"):
        scoring.study_columns(studies, ("ward",))


def test_nearest_neighbours(
    evaluate: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    got = evaluate()["baselines"]["nearest_neighbour"]
    near = list(TRAIN.values())[::-1]
    expected = score_reports(near, REFERENCES, meteor="off")
    assert got["BLEU_1"] == pytest.approx(expected["BLEU_1"])
    clinical = score_labels(rules(near), list(LABELS.values()))
    assert got["clinical"]["all"] == clinical["all"]
    assert "nearest_neighbour" not in evaluate("--no-neighbours")["baselines"]
    monkeypatch.setattr("emrrg.neighbours.UNASKED", 3)
    assert "nearest_neighbour" not in evaluate()["baselines"]
    assert "baseline would read 4 training studies: it is left out" in capsys.readouterr().out
    assert evaluate("--neighbours")["baselines"]["nearest_neighbour"] == got


def test_no_study_is_its_own_neighbour(folder: Path) -> None:
    model = load_run(folder / "run")
    config = TrainConfig(
        dataset="custom", annotation=str(folder / "annotation.json"), images=str(folder / "images")
    )
    training = load_studies(config, SIZE, ("train",))["train"]
    others = nearest_reports(model, training, training, config, torch.device("cpu"))
    vectors = []
    for i in range(4):
        images = training[i].images[None].float().div(255)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        images = (images - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            vectors.append(model.visual_encoder(images[:, 0])[0].mean(0).double())
    middle = torch.stack(vectors).mean(0)
    for i, report in enumerate(others):
        near = {j: float(torch.cosine_similarity(vectors[i] - middle, vectors[j] - middle, 0))
                for j in range(4) if j != i}  # fmt: skip
        assert report == list(TRAIN.values())[max(near, key=near.__getitem__)]


def test_what_all_images_share_does_not_count(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Encoders give all images much the same features: near is what differs alike."""
    known = {0: (100.0, 1.0), 1: (100.0, -1.0), 2: (10.0, 0.5)}
    vectors = [{i: torch.tensor(v) for i, v in known.items()}, {0: torch.tensor((50.0, 0.6))}]
    monkeypatch.setattr(neighbours, "study_features", lambda *_: vectors.pop(0))
    texts = ("a", "b", "c")
    training = RecordStudies([Record(t, t, (), "train") for t in texts], SIZE, cache_bytes=0)
    asked = RecordStudies([Record("q", "q", (), "test")], SIZE, cache_bytes=0)
    model = load_run(folder / "run")
    assert nearest_reports(model, asked, training, TrainConfig(), torch.device("cpu")) == ["c"]


def test_a_blind_model_has_no_neighbours(folder: Path) -> None:
    model = load_run(folder / "run")
    model.adapt(ModelConfig(**{**vars(model.config), "blind": True}))
    studies = PhantomStudies("test", 2, domain="target", size=SIZE, seed=0)
    with pytest.raises(InputError, match="sees no image"):
        nearest_reports(model, studies, studies, TrainConfig(), torch.device("cpu"))
    assert not by_default(model, studies)  # where nobody asks, it is no error


def write_labels(path: Path, names: list[str]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["study_id", *OBSERVATIONS])
        writer.writeheader()
        for k, name in enumerate(names):
            writer.writerow({"study_id": name, "Cardiomegaly": "1.0", "Edema": ("", "-1")[k % 2]})
    return path


def test_labels_from_a_file(evaluate: Any, tmp_path: Path) -> None:
    file = write_labels(tmp_path / "labels.csv", [*reversed(TEST), "other"])
    got = evaluate("--labels", file)["clinical"]
    truth = [{"Cardiomegaly": 1, "Edema": (-1, None)[k % 2]} for k in range(4)]
    assert got["all"] == score_labels(rules(HYPOTHESES), truth)["all"]  # type: ignore[arg-type]
    assert got["labeler"] == f"emrrg rules 1; references: file {file}"
    write_labels(file, ["e0", "e1"])
    with pytest.raises(InputError, match="no labels of 2 of 4 studies, for instance e2"):
        evaluate("--labels", file)
    file.write_text("name,Edema\na,1\n")
    with pytest.raises(InputError, match="no ids in it"):
        evaluate("--labels", file)


def test_labels_by_chexbert(evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def label(texts: Any, checkpoint: Path, vocabulary: Path, device: str) -> list[Any]:
        asked.append((list(texts), checkpoint, vocabulary, device))
        return [{"Fracture": len(text) % 2} for text in texts]

    monkeypatch.setattr(scoring, "label_reports", label)
    flags = ("--chexbert", tmp_path / "c.pth", "--vocabulary", tmp_path / "vocab.txt")
    got = evaluate(*flags)["clinical"]
    expected = score_labels(
        [{"Fracture": len(t) % 2} for t in HYPOTHESES],
        [{"Fracture": len(t) % 2} for t in REFERENCES],
    )
    assert got["observations"] == expected["observations"]
    assert got["labeler"] == "CheXbert; references: the same"
    assert {a[1:] for a in asked} == {(tmp_path / "c.pth", tmp_path / "vocab.txt", "cpu")}
    assert sum(len(a[0]) for a in asked) < 4 * 4  # equal texts (constant reports) once
    file = write_labels(tmp_path / "labels.csv", list(TEST))
    got = evaluate(*flags, "--labels", file)["clinical"]
    assert got["labeler"] == f"CheXbert; references: file {file}"
    assert got["observations"]["Cardiomegaly"]["support"] == 4


def test_without_labels_the_references_are_read() -> None:
    records = [Record(f"s{k}", text, (Path("x"),), "test") for k, text in enumerate(REFERENCES)]
    studies = RecordStudies(records, SIZE, cache_bytes=0)
    assert scoring.known_labels(studies) is None and scoring.study_priors(studies) is None
    truth, source = scoring.Scoring().truth(REFERENCES)
    assert truth == rules(REFERENCES) and source == "emrrg rules 1; references: the same"


def test_only_what_was_read_is_scored() -> None:
    options = scoring.Scoring(
        reference_labels=[{"Edema": k} for k in (0, 1, -1)], columns={"sex": ["F", "M", "F"]},
        priors=[True, None, False], neighbours=["a", "b", "c"], uncertain="ignore",
    ).of([2, 0])  # fmt: skip
    assert options.reference_labels == [{"Edema": -1}, {"Edema": 0}]
    assert options.columns == {"sex": ["F", "F"]} and options.priors == [False, True]
    assert options.neighbours == ["c", "a"] and options.uncertain == "ignore"
    assert options.groups() == {"sex": {"F": [0, 1]}}


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java on the PATH")
def test_tokens_of_image_captions(evaluate: Any) -> None:
    got = evaluate("--tokenization", "ptb")
    expected = score_reports(HYPOTHESES, REFERENCES, tokenization="ptb", meteor="off")
    assert got["BLEU_4"] == pytest.approx(expected["BLEU_4"]) and got["tokenization"] == "ptb"


def test_a_reference_is_cut_in_the_models_tokens(evaluate: Any, folder: Path) -> None:
    """The protocol of R2GenGPT counts tokens, not words."""
    config = json.loads((folder / "run" / "config.json").read_text())
    changed = {**config, "max_report_tokens": 4}
    (folder / "run" / "config.json").write_text(json.dumps(changed))
    try:
        got = evaluate("--protocol", "r2gengpt")
    finally:
        (folder / "run" / "config.json").write_text(json.dumps(config))
    expected = score_reports(
        HYPOTHESES, REFERENCES, protocol="r2gengpt", max_tokens=4, meteor="off",
        tokenizer=load_run(folder / "run").tokenizer,
    )  # fmt: skip
    assert got["truncation_unit"] == expected["truncation_unit"] != "words"
    assert got["BLEU_1"] == pytest.approx(expected["BLEU_1"])


def test_the_page(evaluate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "pages" / "report.html"
    evaluate("--html", page, "--html-studies", 3, "--by", "sex", "--neighbours")
    text = page.read_text(encoding="utf-8")
    assert text.count("<article") == 3 and "<h1>run, test</h1>" in text
    assert text.count('data-map="data:image/png') == 3  # a sentence a report
    assert "nearest neighbour" in text and 'id="by-1"' in text
    told = capsys.readouterr().out
    assert "holds images and reports of patients" in told and str(page) in told


def test_no_evaluation_takes_the_place_of_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)

    def write(self: Any, images: Tensor, view_mask: Tensor, generation: Any) -> list[str]:
        return ["no pneumothorax ."] * len(images)

    monkeypatch.setattr(ReportGenerator, "generate_batch", write)

    def call(*flags: Any) -> dict[str, dict[str, Any]]:
        words = [run, "--bootstrap", 0, "--meteor", "off", *flags]
        assert main([str(word) for word in words]) == 0
        files = sorted(run.glob("evaluation-*/scores.json"))
        return {file.parent.name: json.loads(file.read_text()) for file in files}

    first = call()
    assert set(first) == {"evaluation-test"}
    told = first["evaluation-test"]["evaluated"]
    assert told["split"] == "test" and told["num_beams"] == 1
    assert told["annotation"] == str(folder / "annotation.json")
    assert told["weights"].startswith("step-000001 ")
    assert set(call()) == {"evaluation-test"}  # the same again

    content = json.loads((folder / "annotation.json").read_text())
    for name in ("other", "elsewhere/other"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, "test": content["test"][:2]}))
    other = ["--annotation", tmp_path / "other.json", "--images", folder / "images"]
    found = call(*other)
    assert set(found) == {"evaluation-test", "evaluation-test-other"}
    assert found["evaluation-test"]["pairs"] == 4 and found["evaluation-test-other"]["pairs"] == 2
    capsys.readouterr()
    page = tmp_path / "page.html"
    found = call("--annotation", tmp_path / "elsewhere" / "other.json", *other[2:], "--html", page)
    assert "<h1>run, test, other.json</h1>" in page.read_text(encoding="utf-8")
    assert "evaluation-test-other-2" in found and len(found) == 3
    out = capsys.readouterr().out
    assert "evaluation-test-other holds the scores of another evaluation (annotation " in out
    found = call("--protocol", "r2gen")
    assert found["evaluation-test-2"]["protocol"] == "r2gen"
    assert found["evaluation-test"]["protocol"] == "full"
    assert "(protocol 'full', not 'r2gen')" in capsys.readouterr().out

    output = tmp_path / "out"
    call("--output", output)
    call("--output", output)
    with pytest.raises(InputError, match=r"--output: .*out holds the scores of another .*uncertai"):
        call("--output", output, "--uncertain", "ignore")
    write_json(output / "scores.json", {"BLEU_4": 0.1})  # of a training run, say
    with pytest.raises(InputError, match=r"--output: .*out holds other scores; choose another"):
        call("--output", output)


def test_an_unfinished_run_says_so(
    evaluate: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate()
    hint = f"go on with: python -m emrrg.train --resume {folder / 'run'}"
    out = capsys.readouterr().out
    assert f"{folder / 'run'} is unfinished (last checkpoint: step-000001)" in out and hint in out
    mark_finished(folder / "run")
    evaluate()
    assert "is unfinished (" not in capsys.readouterr().out
    mark_finished(folder / "run", False)


def test_what_cannot_be_written_is_said_before_the_work(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong, right = tmp_path / "file" / "page.html", tmp_path / "out"
    for html, output, flag in ((wrong, right, "--html"), (right / "p.html", wrong, "--output")):
        with pytest.raises(InputError, match=rf"{flag}: .* cannot be written"):
            main([str(folder / "run"), "--html", str(html), "--output", str(output)])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--html", "page.txt"], "--html: page.txt does not end in .html"),
        (["--html-studies", "0"], "--html-studies: 0 is below 1"),
        (["--chexbert", "c.pth"], "--chexbert and --vocabulary: give both"),
        (["--bootstrap", "-1"], "--bootstrap: -1 is below 0"),
        (["--labels", "none.csv"], "none.csv: no such file"),
        (["--annotation", "a.json"], "--annotation and --images: give both"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], says: str, folder: Path) -> None:
    with pytest.raises(InputError) as error:
        main([str(folder / "run"), *flags])
    assert says in str(error.value) and "\n" not in str(error.value)
