"""`python -m emrrg.generate`: one study, and lists of them that go on where they were stopped."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import emrrg
from emrrg.config import ModelConfig, TrainConfig, to_dict
from emrrg.data.phantoms import draw_phantom
from emrrg.decoder import DecoderConfig
from emrrg.errors import InputError
from emrrg.generate import NOTICE, SYNTHETIC, main
from emrrg.model import ReportGenerator, set_regime
from emrrg.runs import save_base, save_checkpoint, write_json
from emrrg.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "../shared/data/xray-sample"
DICOM = ROOT / "../shared/data/dicom"
SIZE = 32

Pixels = Callable[[Tensor, Tensor], list[str]]


def save_run(run: Path, hybrid_layers: tuple[int, ...] = (0,)) -> Path:
    """A run folder with a very small model of random weights."""
    run.mkdir()
    reports = [draw_phantom(i, size=16).report for i in range(30)]
    tokenizer = train_tokenizer(reports, 200, run / "tokenizer.model")
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, hybrid_layers=hybrid_layers,
    )  # fmt: skip
    torch.manual_seed(0)
    config = ModelConfig(image_size=SIZE, dim=16, depth=1, decoder=decoder.to_dict())
    model = ReportGenerator(config, tokenizer)
    trained = set_regime(model, "linear-probe")
    weights = {n: p for n, p in model.named_parameters() if n in trained}
    save_base(run, model, trained)
    save_checkpoint(run, 1, weights, {"step": torch.ones(1)}, {"step": 1}, best=True)
    flags = TrainConfig(dataset="phantoms", num_beams=1, min_new_tokens=2, max_new_tokens=6)
    write_json(run / "config.json", to_dict(flags))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("generate") / "run")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of a report the model writes down what it was shown; the batches so far."""
    batches: list[list[str]] = []

    def describe(self: Any, images: Tensor, view_mask: Tensor, generation: Any) -> list[str]:
        assert images.shape[2:] == (3, SIZE, SIZE) and images.is_floating_point()
        grey = [
            [f"{float(view.mean()):.3f}" for view, there in zip(*study, strict=True) if there]
            for study in zip(images, view_mask, strict=True)
        ]
        batches.append([f"{' '.join(one)} beams {generation.num_beams}" for one in grey])
        return batches[-1]

    monkeypatch.setattr(ReportGenerator, "generate_batch", describe)
    return batches


def expected(*greys: int, beams: int = 1) -> str:
    """What `seen` writes of views of one grey each."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    views = [f"{np.mean((grey / 255 - mean) / deviation):.3f}" for grey in greys]
    return f"{' '.join(views)} beams {beams}"


def picture(path: Path, grey: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (40, 36), grey).save(path)
    return path


def call(*flags: Any) -> None:
    assert main([str(flag) for flag in flags]) == 0


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_views_of_one_study_are_read_together(
    run: Path, seen: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    views = [picture(tmp_path / "a.png", 30), picture(tmp_path / "b.png", 200)]
    call(run, *views, "--num-beams", "2")
    out, err = capsys.readouterr()
    assert out == expected(30, 200, beams=2) + "\n"  # nothing but the report
    assert NOTICE in err
    call(run, views[1], "--json")
    told = json.loads(capsys.readouterr().out)
    notice = f"{NOTICE} {SYNTHETIC}"
    assert told == {"views": [str(views[1])], "report": expected(200), "notice": notice}
    assert len(seen) == 2


def test_the_report_is_the_models(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view = picture(tmp_path / "a.png", 90)
    call(run, view)
    report = emrrg.load(run).generate([[view]])[0]
    assert report and capsys.readouterr().out == report + "\n"


def test_settings_of_one_call(run: Path, tmp_path: Path) -> None:
    model, view = emrrg.load(run), picture(tmp_path / "a.png", 90)
    before = model.generation
    settings = {"num_beams": 3, "max_new_tokens": 6}
    best = model.generate([[view]], **settings)
    three = model.generate([[view], [view]], num_return_sequences=3, **settings)
    assert len(set(three[:3])) == 3 and three[0] == best[0] and three[3:] == three[:3]
    assert model.generation == before
    with pytest.raises(InputError, match="eos_token_id: is the tokenizer's to say"):
        model.generate([[view]], eos_token_id=5)
    with pytest.raises(InputError, match="beams: is no such setting; there are num_beams, min_new"):
        model.generate([[view]], beams=5)


@pytest.mark.skipif(not DICOM.is_dir(), reason=f"no sample DICOM files in {DICOM}")
def test_dicom_stands_where_an_image_may(
    run: Path, seen: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from emrrg.data.images import open_image

    for file in sorted(DICOM.glob("*.dcm")):
        open_image(file).save(tmp_path / "same.png")
        call(run, file)
        call(run, tmp_path / "same.png")
        first, second = capsys.readouterr().out.splitlines()
        assert first == second and first.endswith("beams 1")


def test_heatmap(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    view, drawn = picture(tmp_path / "a.png", 90), tmp_path / "map.png"
    call(run, view, "--heatmap", drawn, "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["report"] and str(drawn) in err
    with Image.open(drawn) as image:
        assert min(image.size) > 200
    blind = save_run(tmp_path / "plain", hybrid_layers=())
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(ReportGenerator, "generate", lambda *_: pytest.fail("too late"))
        with pytest.raises(InputError, match=r"--heatmap: .*map\.png cannot be written"):
            main([str(run), str(view), "--heatmap", str(tmp_path / "file" / "map.png")])
    with pytest.raises(InputError, match="no hybrid layers"):
        main([str(blind), str(view), "--heatmap", str(tmp_path / "no.png")])
    assert not (tmp_path / "no.png").exists()


def write_list(folder: Path, kind: str) -> Path:
    """Five studies: two views, one, a broken file, a missing one, no image at all."""
    for name, grey in (("a.png", 10), ("b.png", 250), ("c.png", 120)):
        picture(folder / "images" / name, grey)
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    studies = [("s1", "a.png;b.png"), ("s2", "broken.png"), ("s3", "c.png"), ("s4", "none.png"),
               ("s5", ""), ("s6", "b.png")]  # fmt: skip
    path = folder / f"studies.{kind}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        if kind in ("csv", "tsv"):
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("study_id", "image", "note"), *((i, p, "x") for i, p in studies)])
        else:
            rows = [{"id": i, "image_path": p.split(";") if p else []} for i, p in studies]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            file.write(lines if kind == "jsonl" else json.dumps(rows))
    return path


REPORTS = {"s1": expected(10, 250), "s3": expected(120), "s6": expected(250)}


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
def test_a_list_of_studies(
    kind: str, run: Path, seen: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output = write_list(tmp_path, kind), tmp_path / "new" / "out.jsonl"
    call(run, "--list", table, "--images", tmp_path / "images", "--output", output,
         "--batch-size", 2)  # fmt: skip
    rows = rows_of(output)
    assert {r["id"]: r["report"] for r in rows if "report" in r} == REPORTS
    assert list(REPORTS) == [r["id"] for r in rows if "report" in r]
    errors = {r["id"]: r["error"] for r in rows if "error" in r}
    assert set(errors) == {"s2", "s4"}
    assert "broken.png" in errors["s2"] and "none.png: no such file" in errors["s4"]
    err = capsys.readouterr().err
    for name in ("left out: s2", "left out: s4", "s5: no image", NOTICE, SYNTHETIC):
        assert name in err
    assert "3 reports, 3 studies left out" in err


def test_an_annotation_file_is_a_list(run: Path, seen: Any, tmp_path: Path) -> None:
    for name, grey in (("a.png", 10), ("b.png", 250), ("c.png", 120)):
        picture(tmp_path / "images" / name, grey)
    parts = {
        "train": [{"id": "s1", "report": "one .", "image_path": ["a.png", "b.png"]}],
        "val": [],
        "test": [
            {"id": "s2", "report": "two .", "image_path": ["c.png"], "split": "test"},
            {"id": 3, "image_path": "b.png"},  # a report is not needed to write one
        ],
    }
    table, output = tmp_path / "annotation.json", tmp_path / "out.jsonl"
    table.write_text(json.dumps(parts))
    flags = ("--list", table, "--images", tmp_path / "images", "--output", output)
    call(run, *flags, "--split", "test")
    assert rows_of(output) == [{"id": "s2", "report": expected(120)},
                               {"id": "3", "report": expected(250)}]  # fmt: skip
    call(run, *flags)  # the others, too
    assert rows_of(output)[2:] == [{"id": "s1", "report": expected(10, 250)}]
    assert sum(map(len, seen)) == 3
    with pytest.raises(InputError, match=r"--split: .*annotation\.json has no study of split"):
        call(run, *flags, "--split", "val")
    table.write_text('{"test": [5]}')
    with pytest.raises(InputError, match=r"must be a list of objects, or an annotation file"):
        call(run, *flags)


def test_a_list_without_ids_and_with_reading_processes(
    run: Path, seen: Any, tmp_path: Path
) -> None:
    for k in range(5):
        picture(tmp_path / f"{k}.png", 50 * k)
    table = tmp_path / "list.csv"
    table.write_text("path\n" + "".join(f"{k}.png\n" for k in range(5)))
    output = tmp_path / "out.jsonl"
    call(run, "--list", table, "--output", output, "--batch-size", 2, "--workers", 1)
    assert rows_of(output) == [{"id": f"row{k + 1}", "report": expected(50 * k)} for k in range(5)]
    assert [len(batch) for batch in seen] == [2, 2, 1]


def test_it_goes_on_where_it_was_stopped(
    run: Path, seen: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    table, output = write_list(tmp_path, "csv"), tmp_path / "out.jsonl"
    flags = ("--list", table, "--images", tmp_path / "images", "--output", output,
             "--batch-size", 1)  # fmt: skip
    write = ReportGenerator.generate_batch

    def stop(self: Any, *args: Any) -> list[str]:
        if seen:
            raise KeyboardInterrupt
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ReportGenerator, "generate_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            call(run, *flags)
    assert [r["id"] for r in rows_of(output)] == ["s1", "s2"]
    with open(output, "a", encoding="utf-8") as file:
        file.write('{"id": "s3", "rep')  # killed in the middle of a line
    picture(tmp_path / "images" / "broken.png", 77)  # mended meanwhile
    call(run, *flags)
    assert sum(map(len, seen)) == 4  # s1 was not done again
    assert {r["id"]: r.get("report") for r in rows_of(output)} == {
        **REPORTS, "s2": expected(77), "s4": None,
    }  # fmt: skip
    assert "1 of 5 studies are done" in capsys.readouterr().err
    before = len(seen)
    call(run, *flags)
    assert len(seen) == before and len(rows_of(output)) == 5


@pytest.mark.parametrize(
    "content",
    ["study_id,image\ns1,a.png\n", "a text without an end", '{"train": []}\n', "[1, 2]\n", "5\n",
     '{"id": "s1", "report": "x"}\nnot ours\n{"id": "s2", "report": "y"}\n', "\n\n"],
)  # fmt: skip
def test_another_file_is_not_overwritten(
    content: str, run: Path, seen: Any, tmp_path: Path
) -> None:
    table, output = write_list(tmp_path, "csv"), tmp_path / "out.jsonl"
    output.write_text(content)
    with pytest.raises(InputError, match=r"out\.jsonl exists, and is not what --list writes"):
        main([str(run), "--list", str(table), "--output", str(output)])
    assert output.read_text() == content


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give image files after the run folder, or --list"),
        (["a.png", "--list", "l.csv"], "give image files after the run folder, or --list"),
        (["--list", "l.csv"], "--output: needed with --list"),
        (["--list", "l.csv", "--output", "o", "--json"], "go with image files"),
        (["a.png", "--output", "o"], "go with --list"),
        (["a.png", "--split", "test"], "go with --list"),
        (["a.png", "--heatmap", "m.jpg"], "does not end in .png"),
        (["--list", "l.csv", "--output", "o", "--batch-size", "0"], "--batch-size"),
        (["none.png"], "none.png: no such file"),
        (["--list", "none.csv", "--output", "o"], "none.csv: no such file"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], says: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        main([str(run), *flags])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no sample X-rays in {SAMPLE}")
def test_real_images_from_the_shell(run: Path, tmp_path: Path) -> None:
    studies = json.loads((SAMPLE / "annotation.json").read_text(encoding="utf-8"))["test"]
    table = tmp_path / "list.json"
    table.write_text(json.dumps(studies))
    flags = ["--list", table, "--images", SAMPLE / "images", "--output", tmp_path / "out.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "emrrg.generate", str(run), *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [str(one["id"]) for one in studies]
    assert all(row["report"] for row in rows)


def test_pad_keeps_the_proportions(tmp_path: Path) -> None:
    from PIL import Image

    from emrrg.data.dataset import RecordStudies
    from emrrg.data.records import Record

    Image.new("L", (40, 20), 255).save(tmp_path / "wide.png")
    record = Record("a", "x .", (tmp_path / "wide.png",), "train")
    stretched = RecordStudies([record], 32, cache_bytes=0)[0].images
    padded = RecordStudies([record], 32, cache_bytes=0, fit="pad")[0].images
    assert stretched.min() == 255
    assert padded[0, 0, 0].max() == 0 and padded[0, 0, 16].min() == 255


def test_a_list_of_which_nothing_can_be_read_is_an_error(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("id,image\na,nowhere.png\nb,nowhere.png\n")
    with pytest.raises(InputError, match="none of the 2 studies"):
        main([str(run), "--list", str(table), "--output", str(tmp_path / "o.jsonl")])


def test_a_model_of_synthetic_images_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (64, 64), 90).save(tmp_path / "a.png")
    assert main([str(run), str(tmp_path / "a.png"), "--json"]) == 0
    assert SYNTHETIC in json.loads(capsys.readouterr().out)["notice"]


@pytest.mark.parametrize("studies", [["a.png", "b.png"], [[]]])
def test_studies_are_lists_of_views(run: Path, studies: list[Any]) -> None:
    model = emrrg.load(run)
    assert model.generate([]) == []
    with pytest.raises(InputError, match=r"studies\[0\].*no list of views"):
        model.generate(studies)
