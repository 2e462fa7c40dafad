"""The audit's sums against the published ones, and its estimate against a real step."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import Any

import pytest
import torch

from emrrg.audit import (
    AuditConfig,
    audit,
    main,
    measure_step,
    measured,
    measured_table,
    memory,
    paper_arithmetic,
    share_table,
    shares,
)
from emrrg.decoder_config import DecoderConfig, read_decoder_config
from emrrg.errors import InputError

SMALL = DecoderConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
)


@pytest.fixture(scope="module")
def large() -> dict[str, Any]:
    return audit(AuditConfig(batch_size=2))


def total(report: dict[str, Any], part: str, *, trainable: bool = False) -> int:
    return sum(
        g["parameters"]
        for g in report["parameters"]
        if g["part"] == part and (g["trainable"] or not trainable)
    )


def test_the_paper_s_setting(large: dict[str, Any]) -> None:
    shares = large["shares"]
    assert total(large, "encoder", trainable=True) == 786_432
    assert total(large, "encoder") == 296_010_720 + 786_432
    assert total(large, "projector") == 4_206_592
    assert total(large, "hybrid layers") == 134_266_888
    assert total(large, "language model") == 6_738_415_616
    assert shares["baselines"] == {
        "encoder": 296_010_720,
        "encoder + projector": 296_010_720 + 4_206_592,
        "what a hook-based counter sees + projector": 202_320_864 + 4_206_592,
        "whole system": 296_010_720 + 786_432 + 4_206_592 + 134_266_888 + 6_738_415_616,
    }
    assert shares["percent"]["adapters + projector"]["encoder + projector"] == pytest.approx(
        1.663, abs=5e-4
    )
    assert large["settings"]["hybrid_layers"] == [0, 8, 16, 24]


def test_where_2_3_percent_comes_from() -> None:
    paper = paper_arithmetic()
    assert paper["release_adapter"] == 16 * (1024 + 512) * 24 == 589_824
    assert paper["encoder_seen_by_hooks"] == 202_320_864
    assert paper["release_percent"] == pytest.approx(2.322, abs=5e-4)
    assert paper["correct_percent"] == pytest.approx(2.418, abs=5e-4)
    assert paper["true_percent"] == pytest.approx(1.663, abs=5e-4)


def test_base_with_further_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emrrg.audit.memory", lambda *_: {})  # another test's
    plain = audit(AuditConfig(preset="base", batch_size=1, hybrid_every=0))
    assert total(plain, "encoder", trainable=True) == 294_912
    assert total(plain, "projector") == 3_158_016 and total(plain, "hybrid layers") == 0
    percent = plain["shares"]["percent"]["adapters + projector"]
    assert percent["encoder + projector"] == pytest.approx(3.950, abs=5e-4)
    more = audit(
        AuditConfig(preset="base", batch_size=1, hybrid_every=0, lora_targets=(), peft=("delta-A",))
    )
    assert total(more, "encoder", trainable=True) == 12 * 4 * 768 * 16


def test_memory_is_the_sum_of_its_parts(large: dict[str, Any]) -> None:
    peft, full = large["memory"]["peft"], large["memory"]["full"]
    trained = sum(g["parameters"] for g in large["parameters"] if g["trainable"])
    assert peft["trainable"] == trained and peft["gradients"] == 4 * trained
    assert peft["optimizer"] == 8 * trained
    assert peft["weights"] == sum(g["bytes"] for g in large["parameters"])
    assert full["trainable"] == sum(g["parameters"] for g in large["parameters"])
    assert peft["activations"] < full["activations"]
    for row in (peft, full):
        keys = ("weights", "gradients", "optimizer", "activations", "recomputed", "logits")
        assert row["total"] == sum(row[key] for key in keys)


def test_activations_grow_with_the_batch_and_shrink_by_checkpointing() -> None:
    def kept(**changes: Any) -> int:
        config = AuditConfig(preset="tiny", image_size=224, **changes)
        return memory(config, SMALL)["full"]["activations_of_encoder_and_projector"]

    # Large enough that the casts of the weights, which are kept once, hardly count.
    small, large = kept(batch_size=8), kept(batch_size=32)
    assert 3.5 < large / small <= 4
    assert kept(batch_size=32, checkpointing=True) < large / 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_a_step_keeps(tmp_path: Path, checkpointing: bool) -> None:
    """The whole step in bf16."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 384,
             "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
        )
    )  # fmt: skip
    config = AuditConfig(
        preset="tiny", llm=str(tmp_path), hybrid_every=1, batch_size=16, checkpointing=checkpointing
    )
    estimate = memory(config, read_decoder_config(tmp_path))
    if checkpointing:
        found = measured(config, estimate)
    else:  # here, where the peak means nothing
        rows: queue.Queue[dict[str, Any]] = queue.Queue()
        for regime in ("peft", "full"):
            measure_step(config, regime, rows)
        found = {r: rows.get() | {"peak_above_weights": None} for r in ("peft", "full")}
    assert set(found) == {"peft", "full"}
    for regime, row in found.items():
        assert row["estimated_kept"] == estimate[regime]["activations"]
        assert row["estimated_peak"] - row["estimated_kept"] == estimate[regime]["recomputed"]
        ratio = row["estimated_kept"] / row["kept"]
        assert 0.98 < ratio < 1.02, (regime, ratio)
        if row["peak_above_weights"] is not None:  # temporaries come on top
            ratio = row["estimated_peak"] / row["peak_above_weights"]
            assert 0.35 < ratio < 1.15, (regime, ratio)
    assert found["peft"]["kept"] < found["full"]["kept"]
    assert (estimate["full"]["recomputed"] > 0) == checkpointing


def test_a_step_that_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emrrg.audit.free_memory", lambda: 2**30)
    monkeypatch.setattr("emrrg.audit.measure_step", None)
    estimate = {regime: {"total": 3 * 2**30} for regime in ("peft", "encoder", "full")}
    found = measured(AuditConfig(llm="somewhere"), estimate)
    assert found["peft"] == {"skipped": "needs about 3.000 GiB, and 0.900 GiB are free"}
    assert "not measured: needs about 3.000 GiB" in measured_table(found)[1][1]


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = tmp_path / "llm"
    llm.mkdir()
    values = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }  # fmt: skip
    (llm / "config.json").write_text(json.dumps(values))
    outputs = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    arguments = ["--preset", "tiny", "--lora-targets", "X,llm", "--llm", str(llm), "--lora-rank"]
    assert main([*arguments, "2", "--hybrid-every", "2", *outputs]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["settings"]["llm_width"] == 32
    assert report["settings"]["hybrid_layers"] == [0, 2]
    lora = 4 * 2 * 256 + 3 * 2 * ((32 + 32) + (32 + 16))
    assert report["shares"]["numerators"]["adapters"] == lora
    text = (tmp_path / "a.md").read_text()
    assert text.startswith("# tiny at 80 x 80 pixels") and "| adapters |" in text
    for word in ("Share that trains", "2.322 %", "visual_encoder.layers.*.mixer.in_proj.lora_X.A"):
        assert word in shown and word in text


def test_bad_values_are_named() -> None:
    with pytest.raises(InputError, match="--lora-targets: 'Y'"):
        main(["--lora-targets", "Y"])
    with pytest.raises(InputError, match="--peft: 'lora'"):
        main(["--peft", "lora"])
    with pytest.raises(InputError, match="is not a folder"):
        main(["--llm", "nowhere"])


def test_nothing_is_allocated(large: dict[str, Any]) -> None:
    assert large["memory"]["full"]["weights"] > 2**34
    assert torch.zeros(1).device.type == "cpu", "no fake tensors are left behind"


def test_what_is_no_part_has_no_share() -> None:
    """Hybrid layers of a 7B model beside the tiny encoder."""
    parts = (("encoder", 10, False), ("encoder", 2, True), ("projector", 1, False))
    groups = [
        {"part": part, "parameters": count, "added": added, "trainable": added, "hook_sees": True}
        for part, count, added in (*parts, ("hybrid layers", 90, False))
    ]
    *_, last = share_table(shares(groups))
    assert last == ["adapters + projector + hybrid layers", "93", "-", "-", "-", "90.291 %"]
