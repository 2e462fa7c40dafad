"""The convert command: released files, runs and adapters for Hugging Face PEFT."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from emrrg.checkpoint import load_encoder, read_released_checkpoint
from emrrg.config import LORA_TARGETS, ModelConfig, TrainConfig, to_dict
from emrrg.convert import main, patterns
from emrrg.decoder import DecoderConfig
from emrrg.errors import InputError
from emrrg.huggingface_adapter import huggingface_adapters
from emrrg.lora import add_lora, lora_state_dict
from emrrg.vision import VisionMamba

D, DEPTH = 32, 2


def encoder(image_size: int = 64) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(image_size=image_size, dim=D, depth=DEPTH).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name and name.endswith("weight"):
                parameter.mul_(3)  # so that B, C and dt matter
    return model


def released(path: Path, **changes: Tensor) -> dict[str, Tensor]:
    """Write a contrastive file; return its encoder's tensors."""
    torch.manual_seed(1)
    state = {n: torch.randn_like(t) for n, t in encoder().state_dict().items()}
    full = {f"visual_encoder.{n}": t for n, t in state.items()}
    full |= {"text_proj.weight": torch.zeros(2, 2), "logit_scale": torch.tensor(2.0), **changes}
    torch.save({"model": full, "config": argparse.Namespace(projection_dim=2)}, path)
    return state


def awake(model: torch.nn.Module, names: list[str]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            parameters[name].normal_(std=0.2)


def test_a_released_file_becomes_safetensors_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = released(tmp_path / "clip.pth")
    assert main([str(tmp_path / "clip.pth"), str(tmp_path / "out")]) == 0
    tensors = load_file(tmp_path / "out" / "weights.safetensors")
    assert {n.removeprefix("visual_encoder."): t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in state.items()
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["kind"], config["source"], config["missing"]) == ("stage2", "clip.pth", [])
    assert config["vision"] == {
        "dim": D, "depth": DEPTH, "state_dim": 16, "patch_size": 16, "image_size": 64,
    }  # fmt: skip
    assert config["settings"] == {"projection_dim": 2} and config["size"] is None
    assert set(config["unused"]) == {"text_proj.weight", "logit_scale"}
    shown = capsys.readouterr().out
    assert "left behind (text projection of the contrastive stage): text_proj.weight" in shown
    again = read_released_checkpoint(tmp_path / "out")
    model = encoder()
    assert load_encoder(model, again.tensors).missing == []
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())


def test_interpolation_dtype_and_base(tmp_path: Path) -> None:
    state = released(tmp_path / "clip.pth")
    torch.save(
        {"model": {"llama_proj.weight": torch.randn(8, D), "llama_proj.bias": torch.randn(8)}},
        tmp_path / "down.pth",
    )
    arguments = ["--base", str(tmp_path / "clip.pth"), "--image-size", "96", "--dtype", "bf16"]
    main([str(tmp_path / "down.pth"), str(tmp_path / "out"), *arguments])
    tensors = load_file(tmp_path / "out" / "weights.safetensors")
    assert tensors["visual_encoder.pos_embed"].shape == (1, 37, D)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert torch.equal(
        tensors["visual_encoder.pos_embed"][:, 18], state["pos_embed"][:, 8].bfloat16()
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kind"] == "downstream" and not config["missing"]
    assert any("taken from clip.pth" in note for note in config["notes"])
    assert any("interpolated to 6 x 6" in note for note in config["notes"])


def test_what_cannot_be_converted_ends_in_one_line(tmp_path: Path) -> None:
    released(tmp_path / "clip.pth")
    torch.save({"model": {"x": torch.zeros(1)}, "config": eval}, tmp_path / "bad.pth")
    (tmp_path / "file").write_text("")
    cases = {
        (str(tmp_path / "bad.pth"), "out"): "asks for builtins.eval",
        (str(tmp_path / "none.pth"), "out"): "none.pth: cannot be read",
        (str(tmp_path / "clip.pth"), str(tmp_path / "file")): "is a file; give a folder",
        (str(tmp_path / "clip.pth"), "out", "--image-size", "100"): "100 is not a multiple of 16",
        (str(tmp_path / "clip.pth"), "out", "--adapter-format", "peft"): "holds no LoRA adapters",
    }
    for arguments, message in cases.items():
        with pytest.raises(InputError, match=message):
            main(list(arguments))
    done = subprocess.run(
        [sys.executable, "-m", "emrrg.convert", str(tmp_path / "bad.pth"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "builtins.eval" in done.stderr


def test_names_are_listed_by_pattern() -> None:
    names = ["layers.0.a.weight", "layers.11.a.weight", "head.bias"]
    assert patterns(names) == ["layers.*.a.weight (2)", "head.bias"]


@pytest.mark.parametrize(
    "targets",
    [
        ("X",), ("X", "Z"), ("dt_in", "B", "C"), ("x_proj", "dt_proj"), ("out_proj", "patch_embed"),
        tuple(t for t in LORA_TARGETS if t != "llm"),
    ],
)  # fmt: skip
def test_hugging_face_peft_computes_the_same(tmp_path: Path, targets: tuple[str, ...]) -> None:
    peft = pytest.importorskip("peft", reason="Hugging Face PEFT is not installed")
    model = encoder()
    images = torch.randn(2, 3, 64, 64)
    awake(model, add_lora(model, targets, rank=3, scale=0.5))
    tensors = {f"visual_encoder.{n}": t for n, t in lora_state_dict(model).items()}
    tensors |= {f"visual_encoder.{n}": t for n, t in encoder().state_dict().items()}
    vision = {"dim": D, "state_dim": 16, "patch_size": 16}
    config, adapter = huggingface_adapters(tensors, vision, scale=0.5)["visual_encoder"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    save_file({n: t.detach() for n, t in adapter.items()}, tmp_path / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(encoder(), str(tmp_path)).eval()
    with torch.no_grad():
        base, ours = encoder()(images), model(images)
        assert (ours - base).abs().max() > 1e-2
        torch.testing.assert_close(theirs(images), ours, rtol=1e-4, atol=1e-5)


def test_a_run_is_converted_with_its_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft", reason="Hugging Face PEFT is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from emrrg.model import ReportGenerator
    from emrrg.peft import adapter_parameter_names
    from emrrg.runs import save_base, save_checkpoint, write_json
    from emrrg.tokenizer import train_tokenizer

    reports = ["the heart is normal .", "no pleural effusion .", "lungs are clear ."] * 8
    tokenizer = train_tokenizer(reports, 64, tmp_path / "tokenizer.model")
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ReportGenerator(
        ModelConfig(
            image_size=32, dim=D, depth=DEPTH, decoder=decoder.to_dict(), lora_targets=("X", "llm"),
            lora_rank=3, lora_scale=0.5,
        ),
        tokenizer,
    ).eval()  # fmt: skip
    names = adapter_parameter_names(model)
    awake(model, names)
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "config.json", to_dict(TrainConfig(recipe="phantoms")))
    save_base(run, model, names)
    trained = {n: p for n, p in model.named_parameters() if n in names}
    save_checkpoint(run, 1, trained, {}, {"step": 1}, best=True)

    out = tmp_path / "out"
    main([str(run), str(out), "--adapter-format", "peft"])
    assert "adapters: X, llm; rank 3, scale 0.5" in capsys.readouterr().out
    tensors = load_file(out / "weights.safetensors")
    assert all(torch.equal(tensors[n], p) for n, p in model.named_parameters())
    theirs = peft.PeftModel.from_pretrained(
        VisionMamba(image_size=32, dim=D, depth=DEPTH).eval(), str(out / "peft" / "visual_encoder")
    )
    plain = {
        n.removeprefix("visual_encoder."): t
        for n, t in tensors.items()
        if n.startswith("visual_encoder.") and ".lora_" not in n
    }
    wrapped = {
        n: plain[n.removeprefix("base_model.model.").replace(".base_layer.", ".")]
        for n in theirs.state_dict()
        if ".lora_" not in n
    }
    theirs.load_state_dict(wrapped, strict=False)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model.visual_encoder(images))
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        )
    ).eval()  # fmt: skip
    base = {
        n.removeprefix("llama_model."): t
        for n, t in tensors.items()
        if n.startswith("llama_model.") and ".lora_" not in n
    }
    llama.load_state_dict(base)
    adapted = peft.PeftModel.from_pretrained(llama, str(out / "peft" / "llama_model")).eval()
    embeds = torch.randn(1, 4, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(inputs_embeds=embeds).logits, model.llama_model(embeds), rtol=1e-4, atol=1e-5
        )
