"""Released weight files of every stage, damaged and hostile ones, and safetensors out."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from emrrg.checkpoint import (
    ReleasedCheckpoint,
    load_encoder,
    load_released,
    read_released_checkpoint,
    write_safetensors,
)
from emrrg.decoder import Decoder, DecoderConfig
from emrrg.errors import InputError
from emrrg.lora import add_lora
from emrrg.unpickling import PickledFile
from emrrg.vision import VisionMamba, interpolate_pos_embed

SUFFIXES = ("_b", "_c", "_c_b")
D, H, SIDE = 128, 32, 8  # the tiny preset, a decoder of width 32, patches a side


def encoder(image_size: int = 128) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(image_size=image_size, dim=D, depth=4)


def encoder_state(image_size: int = 128) -> dict[str, Tensor]:
    return {n: torch.randn_like(t) for n, t in encoder(image_size).state_dict().items()}


def stage1_state() -> dict[str, Tensor]:
    """One direction, no class token, no final norm, no prefix, and a decoder beside."""
    state = {
        n: t
        for n, t in encoder_state(96).items()
        if not any(f"{k}_log" in n or n.endswith(f".D{k}") or f"{k}." in n for k in SUFFIXES)
        and n not in ("cls_token", "norm_f.weight", "norm_f.bias")
    }
    state["pos_embed"] = torch.randn(1, 36, D)
    state["ar_token"] = torch.randn(1, 1, 16)
    state["dec_pos_embed"] = torch.randn(1, 36, 16)
    state["enc2dec.weight"] = torch.randn(64, 4 * D)
    state["dec_block.0.mlp.fc1.weight"] = torch.randn(8, 16)
    state["norm_1.weight"] = torch.randn(D)
    state["mask"] = torch.zeros(3, 3)
    return state


def downstream_state() -> dict[str, Tensor]:
    state = {f"visual_encoder.{n}": t.bfloat16() for n, t in encoder_state().items()}
    state |= {
        "llama_proj.weight": torch.randn(H, D),
        "llama_proj.bias": torch.randn(H),
        "layer_norm.weight": torch.randn(H),
        "layer_norm.bias": torch.randn(H),
    }
    return state


def save(path: Path, state: dict[str, Tensor], **rest: Any) -> Path:
    torch.save({"model": collections.OrderedDict(state), **rest}, path)
    return path


class System(nn.Module):
    """The parts of a report generator that weight files are about."""

    def __init__(self, hybrid: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.visual_encoder = encoder()
        self.llama_proj = nn.Linear(D, H)
        self.layer_norm = nn.LayerNorm(H)
        self.llama_model = Decoder(
            DecoderConfig(
                vocab_size=20,
                hidden_size=H,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
        if hybrid:
            self.llama_model.add_hybrid_layers(hybrid)


def test_stage1_becomes_four_directions_on_another_grid(tmp_path: Path) -> None:
    state = stage1_state()
    path = save(
        tmp_path / "stage1.pth",
        state,
        epoch=99,
        args=argparse.Namespace(lr=1e-3, blr=None, data_path="somewhere"),
        optimizer={"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    )
    released = read_released_checkpoint(path)
    assert (released.kind, released.size) == ("stage1", "tiny")
    assert released.vision == {
        "dim": D, "depth": 4, "state_dim": 16, "patch_size": 16, "image_size": 96,
    }  # fmt: skip
    assert released.settings == {
        "lr": 1e-3, "blr": None, "data_path": "somewhere", "epoch": 99,
    }  # fmt: skip
    assert set(released.unused) == {
        "ar_token", "dec_pos_embed", "enc2dec.weight", "dec_block.0.mlp.fc1.weight",
        "norm_1.weight", "mask", "optimizer",
    }  # fmt: skip
    assert released.unused["optimizer"] == "stands beside the model's weights"
    assert released.missing == [
        f"visual_encoder.{n}" for n in ("cls_token", "norm_f.weight", "norm_f.bias")
    ]
    model = encoder()
    kept = model.cls_token.detach().clone()
    report = load_encoder(model, released.tensors)
    assert report.missing == ["cls_token", "norm_f.weight", "norm_f.bias"]
    assert "interpolated to 8 x 8" in report.notes[0]
    assert torch.equal(model.cls_token, kept)
    assert model.pos_embed[0, 32].abs().max() == 0
    torch.testing.assert_close(
        model.pos_embed.detach(), interpolate_pos_embed(state["pos_embed"], (8, 8))
    )
    for i in range(4):
        mixer, at = model.layers[i].mixer, f"layers.{i}.mixer"
        for k in ("", *SUFFIXES):
            assert torch.equal(getattr(mixer, f"A{k}_log"), state[f"{at}.A_log"])
            assert torch.equal(getattr(mixer, f"D{k}"), state[f"{at}.D"])
            assert torch.equal(getattr(mixer, f"x_proj{k}").weight, state[f"{at}.x_proj.weight"])
            for name in ("conv1d", "dt_proj"):
                layer = getattr(mixer, f"{name}{k}")
                assert torch.equal(layer.weight, state[f"{at}.{name}.weight"])
                assert torch.equal(layer.bias, state[f"{at}.{name}.bias"])
        assert torch.equal(mixer.in_proj.weight, state[f"{at}.in_proj.weight"])


def test_the_paper_s_grid_from_12_to_14(tmp_path: Path) -> None:
    state = {n: t[:, :12] if n == "pos_embed" else t for n, t in encoder_state().items()}
    state["pos_embed"] = torch.randn(1, 144, D)
    del state["cls_token"]
    model = VisionMamba(image_size=224, dim=D, depth=4)
    load_encoder(model, read_released_checkpoint(save(tmp_path / "a.pth", state)).tensors)
    assert model.pos_embed.shape == (1, 197, D) and model.pos_embed[0, 98].abs().max() == 0


def test_stage2_leaves_the_text_side_behind(tmp_path: Path) -> None:
    state = {f"visual_encoder.{n}": t for n, t in encoder_state().items()}
    behind = {
        "text_encoder.embeddings.word_embeddings.weight": torch.randn(5, 4),
        "vision_proj.weight": torch.randn(4, D),
        "text_proj.bias": torch.randn(4),
        "logit_scale": torch.tensor(2.6),
    }
    released = read_released_checkpoint(save(tmp_path / "clip.pth", state | behind))
    assert (released.kind, released.size, released.missing) == ("stage2", "tiny", [])
    assert set(released.unused) == set(behind) and set(released.tensors) == set(state)
    model = encoder()
    assert load_encoder(model, released.tensors).missing == []
    assert torch.equal(model.norm_f.bias, state["visual_encoder.norm_f.bias"])


def test_downstream_in_bf16_with_a_namespace(tmp_path: Path) -> None:
    state = downstream_state()
    config = argparse.Namespace(
        dataset="mimic_cxr", llm_alpha=16, path=Path("a/b"), betas=(0.9, 0.98),
        best=np.float64(0.25), device=torch.device("cuda", 0), size=torch.Size([2, 3]),
        nested=types.SimpleNamespace(x={1, 2}),
    )  # fmt: skip
    path = save(tmp_path / "checkpoint.pth", state, config=config, epoch=4, step=1000)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    released = read_released_checkpoint(path)
    assert released.kind == "downstream" and not released.unused and not released.missing
    assert released.settings == {
        "dataset": "mimic_cxr", "llm_alpha": 16, "path": "a/b", "betas": [0.9, 0.98], "best": 0.25,
        "device": "cuda:0", "size": [2, 3], "nested": {"x": [1, 2]}, "epoch": 4, "step": 1000,
    }  # fmt: skip
    assert released.tensors["visual_encoder.cls_token"].dtype == torch.bfloat16
    model = System()
    report = load_released(model, released)
    assert not report.missing and len(report.loaded) == len(state)
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor.float()), name


def test_only_what_trained_is_there(tmp_path: Path) -> None:
    state = {n: t for n, t in downstream_state().items() if not n.startswith("visual")}
    released = read_released_checkpoint(save(tmp_path / "iu.pth", state))
    assert released.vision == {"dim": D} and released.size == "tiny"
    assert released.missing == ["visual_encoder.*"] and not released.has_encoder()
    model = System()
    load_released(model, released)
    assert torch.equal(model.llama_proj.weight, state["llama_proj.weight"])
    with pytest.raises(InputError, match="no vision encoder"):
        load_encoder(model.visual_encoder, released.tensors)
    del state["llama_proj.weight"]
    state["llama_proj.weight"] = torch.randn(64, D)
    with pytest.raises(InputError, match=r"llama_proj.weight has shape \(64, 128\)"):
        load_released(model, read_released_checkpoint(save(tmp_path / "wide.pth", state)))


def test_the_misplaced_adapter_is_refused_with_an_explanation(tmp_path: Path) -> None:
    state = downstream_state()
    at = "visual_encoder.layers.0.mixer.lora_X"
    state[f"{at}.adapter_down.weight"] = torch.randn(16, D)
    state[f"{at}.adapter_up.weight"] = torch.randn(D // 2, 16)
    path = save(tmp_path / "emrrg.pth", state, config=argparse.Namespace(s_X=1.0))
    with pytest.raises(InputError, match=r"lora_X: the release adds this half-width adapter to"):
        read_released_checkpoint(path)
    released = read_released_checkpoint(path, drop_misplaced_lora=True)
    assert released.kind == "emrrg" and at in released.unused and released.lora is None
    assert "left behind as asked" in released.unused[at]
    state[f"{at}.adapter_up.weight"].zero_()
    released = read_released_checkpoint(save(path, state))
    assert "at zero" in released.unused[at]


def test_adapters_of_mambapeft_and_of_hugging_face(tmp_path: Path) -> None:
    state = downstream_state()
    for i in range(4):
        at = f"visual_encoder.layers.{i}.mixer"
        state[f"{at}.lora_X.adapter_down.weight"] = torch.randn(4, D)
        state[f"{at}.lora_X.adapter_up.weight"] = torch.randn(D, 4)
        for k in ("", *SUFFIXES):
            state[f"{at}.lora_B{k}.adapter_down.weight"] = torch.randn(4, D)
            state[f"{at}.lora_B{k}.adapter_up.weight"] = torch.randn(16, 4)
    for i in range(3):
        for name, rows in (("q_proj", H), ("v_proj", H // 2)):
            at = f"llama_model.base_model.model.model.layers.{i}.self_attn.{name}"
            state[f"{at}.lora_A.default.weight"] = torch.randn(4, H)
            state[f"{at}.lora_B.default.weight"] = torch.randn(rows, 4)
    config = argparse.Namespace(s_X=0.5, s_B=0.5, llm_alpha=2, llm_r=4)
    released = read_released_checkpoint(save(tmp_path / "a.pth", state, config=config))
    assert released.lora == {"targets": ["B", "X", "llm"], "rank": 4, "scale": 0.5}
    assert not released.unused
    model = System()
    with pytest.raises(InputError, match="add the adapters first: targets"):
        load_released(model, released)
    add_lora(model, **released.lora)
    load_released(model, released)
    got = dict(model.named_parameters())
    at = "visual_encoder.layers.2.mixer"
    assert torch.equal(got[f"{at}.in_proj.lora_X.B"], state[f"{at}.lora_X.adapter_up.weight"])
    down = state[f"{at}.lora_B_c.adapter_down.weight"]
    assert torch.equal(got[f"{at}.x_proj_c.lora_B.A"], down)
    name = "llama_model.model.layers.1.self_attn.v_proj.lora_llm.B"
    source = "llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"
    assert torch.equal(got[name], state[source])
    with pytest.raises(InputError, match="does not say its adapters' scale"):
        read_released_checkpoint(save(tmp_path / "b.pth", state))
    assert read_released_checkpoint(tmp_path / "b.pth", lora_scale=0.1).lora["scale"] == 0.1


def test_adapters_of_this_project_in_a_bare_file(tmp_path: Path) -> None:
    """As the weights of a run's checkpoint lie there: no word about targets, rank or scale."""
    state = {f"visual_encoder.{n}": t for n, t in encoder_state().items()}
    state["visual_encoder.layers.1.mixer.in_proj.lora_X.A"] = torch.randn(4, D)
    state["visual_encoder.layers.1.mixer.in_proj.lora_X.B"] = torch.randn(D, 4)
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, state)
    with pytest.raises(InputError, match=r"lora_X\.A: the file does not say .* --lora-scale"):
        read_released_checkpoint(path)
    released = read_released_checkpoint(path, lora_scale=0.5)
    assert released.lora == {"targets": ["X"], "rank": 4, "scale": 0.5}
    assert set(released.tensors) == set(state) and not released.unused
    del state["visual_encoder.layers.1.mixer.in_proj.lora_X.B"]
    write_safetensors(path, state)
    with pytest.raises(InputError, match=r"lora_X\.A has no B beside it"):
        read_released_checkpoint(path)
    with pytest.raises(InputError, match=r"holds no config\.json; give a \.pth or \.safetensors"):
        read_released_checkpoint(tmp_path)


def test_hybrid_layers_of_the_release(tmp_path: Path) -> None:
    state = downstream_state()
    at = "llama_model.model.layers.1.self_attn."
    heads, size = 2, 8
    keys, values = torch.randn(heads, size, H), torch.randn(heads, size, H)
    mixed = torch.stack([keys, values], dim=1).reshape(2 * heads * size, H)
    state |= {
        f"{at}cross_attn_kv_proj.weight": mixed,
        f"{at}cross_attn_kv_proj.bias": mixed[:, 0],
        f"{at}cross_attn_gate_proj.0.weight": torch.randn(1, H),
        f"{at}cross_attn_gate_proj.0.bias": torch.randn(1),
        f"{at}cross_attn_warm_up_gate": torch.tensor([0.3]),
    }
    released = read_released_checkpoint(save(tmp_path / "a.pth", state), head_dim=size)
    assert released.hybrid_layers == (1,) and released.kind == "emrrg"
    with pytest.raises(InputError, match="--hybrid-layers 1"):
        load_released(System(), released)
    model = System(hybrid=(1,))
    load_released(model, released)
    cross = model.llama_model.model.layers[1].cross_attn
    assert torch.equal(cross.kv_proj.weight, torch.cat([keys, values]).reshape(-1, H))
    assert torch.equal(cross.kv_proj.bias, torch.cat([keys, values]).reshape(-1, H)[:, 0])
    assert torch.equal(cross.gate.weight, state[f"{at}cross_attn_gate_proj.0.weight"])
    assert cross.alpha.tolist() == pytest.approx([0.3])
    with pytest.raises(InputError, match="width of a head"):
        read_released_checkpoint(tmp_path / "a.pth")


def test_wrapped_names_and_unknown_tensors(tmp_path: Path) -> None:
    state = {f"module._orig_mod.{n}": t for n, t in encoder_state().items()}
    state["module._orig_mod.surprise"] = torch.zeros(2)
    state["steps"] = 7  # type: ignore[assignment]
    released = read_released_checkpoint(save(tmp_path / "a.pth", state))
    assert released.unused == {
        "visual_encoder.surprise": "unknown to this project's encoder",
        "steps": "is no tensor",
    }
    assert released.kind == "encoder" and not released.missing


def test_an_encoder_that_does_not_fit_names_the_tensor() -> None:
    state = encoder_state()
    broken = {n: t for n, t in state.items() if n != "layers.2.mixer.D_c"}
    with pytest.raises(InputError, match=r"layers\.2\.mixer\.D_c of the encoder is missing"):
        load_encoder(encoder(), broken)
    with pytest.raises(InputError, match=r"layers\.4\.norm1\.bias has no place"):
        load_encoder(encoder(), state | {"layers.4.norm1.bias": torch.zeros(D)})
    with pytest.raises(InputError, match=r"norm_f\.bias has shape \(3,\)"):
        load_encoder(encoder(), state | {"norm_f.bias": torch.zeros(3)})


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_give_the_stored_bits(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(6, 4)
    state = {
        "whole": base,
        "transposed": base.t(),
        "part": base[2:4, 1:3],
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "double": torch.randn(2, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7.0),
        "parameter": nn.Parameter(torch.randn(2)),
    }
    torch.save({"model": state}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    file = PickledFile(tmp_path / "a.pth")
    tensors = file.tensors(file.content["model"])
    for name, tensor in state.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor.detach()), name
    tensors["whole"].zero_()
    assert torch.equal(tensors["transposed"], base.t()), "tensors share memory"


class Hostile:
    """Runs a command when an ordinary unpickler meets it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class Evaluating:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


class Opening:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_are_refused_by_name(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "was-here"
    cases = {
        rf"{os.system.__module__}\.system": Hostile(mark),
        r"builtins\.eval": Evaluating(),
        r"io\.open": Opening(mark),
        r"collections\.Counter": collections.Counter("ab"),
        r"torch\.nn\.modules\.linear\.Linear": nn.Linear(1, 1),
    }
    for name, thing in cases.items():
        path = tmp_path / "bad.pth"
        content = {"model": {"w": torch.zeros(1)}, "config": thing}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=rf"bad\.pth: its pickle asks for {name}"):
            read_released_checkpoint(path)
    assert not mark.exists()


def archive(path: Path, program: bytes) -> Path:
    """A .pth whose pickle is this program."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/data/0", b"\0" * 8)
    return path


def test_stand_ins_cannot_be_turned_against_us(tmp_path: Path) -> None:
    """Programs that use only the names that are allowed, in ways that no file of tensors does."""
    protocol = b"\x80\x02"
    storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\00X\x03\0\0\0cpuK\x02tQ"
    programs = {
        "state for a function": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\x01sb.",
        "state for a class": b"cargparse\nNamespace\n}X\x01\0\0\0aK\x01sb.",
        "slots of a class": b"ccollections\nOrderedDict\nN}X\x08\0\0\0__init__K\x01s\x86b.",
        "reading past the storage": b"ctorch._utils\n_rebuild_tensor_v2\n"
        + storage
        + b"K\x00K\x09\x85K\x01\x85\x89NtR.",
        "a stride below zero": b"ctorch._utils\n_rebuild_tensor_v2\n"
        + storage
        + b"K\x01K\x02\x85J\xff\xff\xff\xff\x85\x89NtR.",
        "another builder": b"ctorch._tensor\n_rebuild_from_type_v2\n(cargparse\nNamespace\nN)NtR.",
        "a number": b"K\x01.",
        "nothing": b"",
        "noise": b"\x93\x94\x95garbage",
    }
    for name, program in programs.items():
        path = archive(tmp_path / "odd.pth", protocol + program)
        with pytest.raises(InputError, match=r"odd\.pth"):
            read_released_checkpoint(path)
            pytest.fail(name)


def test_damaged_files_end_in_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", encoder_state())
    data = path.read_bytes()
    for cut in (0, 1, 100, len(data) // 2, len(data) - 10):
        (tmp_path / "cut.pth").write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"cut\.pth: (cannot be read|is not a PyTorch)"):
            read_released_checkpoint(tmp_path / "cut.pth")
    torch.save({"model": encoder_state()}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cut short"):
        read_released_checkpoint(tmp_path / "cut.pth")
    with pytest.raises(InputError, match=r"none\.pth: cannot be read \(No such file"):
        read_released_checkpoint(tmp_path / "none.pth")
    torch.save({"model": {"a": 1}}, path)
    with pytest.raises(InputError, match="holds no tensors"):
        read_released_checkpoint(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(InputError, match="holds a list"):
        read_released_checkpoint(path)
    (tmp_path / "x.zip.pth").write_bytes(b"PK\x05\x06" + b"\0" * 18)
    with pytest.raises(InputError, match="PyTorch did not write it"):
        read_released_checkpoint(tmp_path / "x.zip.pth")
    (tmp_path / "a.safetensors").write_bytes(b"12345678{")
    with pytest.raises(InputError, match=r"a\.safetensors: cannot be read as safetensors"):
        read_released_checkpoint(tmp_path / "a.safetensors")


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    state = encoder_state()
    write_safetensors(tmp_path / "e.safetensors", state)
    released = read_released_checkpoint(tmp_path / "e.safetensors")
    assert isinstance(released, ReleasedCheckpoint) and released.kind == "encoder"
    model = encoder()
    load_encoder(model, released.tensors)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())


def test_writing_copes_with_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {"a": base, "b": base, "c": base[1:], "d": base.t(), "e": torch.zeros(0)}
    write_safetensors(tmp_path / "w.safetensors", tensors, {"format": "emrrg"})
    back = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(back[n], t) for n, t in tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    program = (
        "import os, sys, torch\n"
        "import emrrg.checkpoint as c\n"
        "def die(*_): os._exit(9)\n"
        "c.os.replace = die\n"
        "c.write_safetensors(sys.argv[1], {'a': torch.zeros(1000)})\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == 9
    assert path.read_bytes() == before
    with pytest.raises(OSError):
        write_safetensors(tmp_path / "nowhere" / "w.safetensors", {"a": torch.ones(1)})
