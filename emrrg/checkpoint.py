"""Weight files: the released ones in, safetensors out.

Released files (MambaXray-VL and EMRRG, ``.pth``) are read by `emrrg.unpickling`, which runs nothing
of theirs. Whatever the layout, the tensors come out under this project's names, those of
`emrrg.model.ReportGenerator`:

    stage 1      autoregressive pre-training: no prefix, one scan direction (copied to four), no
                 class token; its decoder stays behind
    stage 2      contrastive: `visual_encoder.*`; the text encoder and projections stay behind
    downstream   MambaXray-VL stage 3 and EMRRG: what trained of `visual_encoder.*`, `llama_proj.*`,
                 `layer_norm.*`, adapters, and `llama_model.*` with its hybrid layers

What stays behind, and why, is listed in `ReleasedCheckpoint.unused`; what a whole encoder has and
the file has not, in `missing`.

Shapes: D encoder width, H decoder width, N states, R rank of dt.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emrrg.config import LORA_TARGETS, read_json
from emrrg.errors import InputError
from emrrg.lora import DIRECTIONS
from emrrg.unpickling import PickledFile, TensorRecord
from emrrg.vision import VISION_PRESETS, VisionMamba, interpolate_pos_embed

WEIGHTS = "weights.safetensors"
CONVERTED_CONFIG = "config.json"
FORMAT = "emrrg-weights"

# Parameters that the autoregressive files lack; a model keeps its own initial values for them.
ABSENT_IN_STAGE1 = ("cls_token", "norm_f.weight", "norm_f.bias")
ENCODER = "visual_encoder."
PROJECTOR = ("llama_proj.", "layer_norm.")

# What the other stages hold beside the system of this project, and why it stays behind.
LEFT_BEHIND = {
    "text_encoder.": "text encoder of the contrastive stage",
    "vision_proj.": "image projection of the contrastive stage",
    "text_proj.": "text projection of the contrastive stage",
    "logit_scale": "temperature of the contrastive stage",
    "temp": "temperature of the contrastive stage",
    "dec_block.": "decoder of the autoregressive stage",
    "dec_pos_embed": "decoder of the autoregressive stage",
    "enc2dec.": "decoder of the autoregressive stage",
    "ar_token": "decoder of the autoregressive stage",
    "ar_norm.": "decoder of the autoregressive stage",
    "ar_pred.": "decoder of the autoregressive stage",
    "norm_1.": "decoder of the autoregressive stage",
    "norm_2.": "decoder of the autoregressive stage",
    "norm_3.": "decoder of the autoregressive stage",
    "norm_4.": "decoder of the autoregressive stage",
    "mask": "attention mask of the autoregressive stage, a constant",
    "head.": "classification head",
}

# Adapter names of MambaPEFT's code: its module, and this project's target.
MAMBAPEFT = {
    "lora_X": ("in_proj", "X"), "lora_Z": ("in_proj", "Z"), "lora_in_proj": ("in_proj", "in_proj"),
    "lora_out_proj": ("out_proj", "out_proj"), "lora_x_proj": ("x_proj", "x_proj"),
    "lora_d": ("x_proj", "dt_in"), "lora_B": ("x_proj", "B"), "lora_C": ("x_proj", "C"),
    "lora_dt": ("dt_proj", "dt_proj"),
}  # fmt: skip
MISPLACED = (
    "the release adds this half-width adapter to the first half of the mixer's output, not to X "
    "inside the mixer, and wraps the blocks so that every one runs the last block's mixer; no "
    "correct model has a place for it, and the weights trained around it answer to that wiring. "
    "--drop-misplaced-lora converts the rest of the file without it"
)


@dataclass
class ReleasedCheckpoint:
    """The tensors of a weight file, under this project's names."""

    path: Path
    kind: str
    """``stage1``, ``stage2``, ``downstream``, ``emrrg``, ``encoder`` or ``converted``."""
    size: str | None
    """``tiny``, ``base``, ``large``, ``huge``; None: none of them, or no tensor that tells."""
    vision: dict[str, Any]
    """Arguments of `VisionMamba` as far as the tensors tell them."""
    tensors: dict[str, Tensor]
    """Name in `ReportGenerator` to tensor, in the stored dtype."""
    lora: dict[str, Any] | None = None
    """``targets``, ``rank`` and ``scale`` of the adapters among the tensors."""
    hybrid_layers: tuple[int, ...] = ()
    """Decoder layers whose new parameters are among the tensors."""
    missing: list[str] = field(default_factory=list)
    """Encoder tensors that the file lacks."""
    unused: dict[str, str] = field(default_factory=dict)
    """Tensors of the file that stay behind, and why."""
    notes: list[str] = field(default_factory=list)
    """What was done beyond renaming."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that the file holds beside its tensors."""

    def has_encoder(self) -> bool:
        """Whether any encoder tensor is there."""
        return any(name.startswith(ENCODER) for name in self.tensors)


@dataclass
class LoadReport:
    """What loading did."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Parameters that keep the values they had."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors without a place in the model."""
    notes: list[str] = field(default_factory=list)


def read_released_checkpoint(
    path: str | os.PathLike[str],
    *,
    lora_scale: float | None = None,
    head_dim: int | None = None,
    drop_misplaced_lora: bool = False,
) -> ReleasedCheckpoint:
    """Read a weight file of any stage, or one that was converted before.

    Args:
        path: a ``.pth``, a ``.safetensors``, or a folder that `emrrg.convert` wrote.
        lora_scale: scale of adapters in a file that does not say it.
        head_dim: width of an attention head, for hybrid layers in a file; None: 128, that of
            Llama-2-7B and Qwen1.5-1.8B.
        drop_misplaced_lora: leave the release's misplaced ``lora_X`` behind instead of refusing it.
    Returns:
        The tensors on the CPU.
    Raises:
        InputError: missing, damaged, hostile or unknown file; a layout or an adapter that has no
            meaning here.
    """
    path = Path(path)
    if path.is_dir():
        return _read_converted(path)
    if path.suffix == ".safetensors":
        tensors, settings = read_safetensors(path), dict[str, Any]()
        unused: dict[str, str] = {}
    else:
        tensors, settings, unused = _read_pickled(path)
    layout = _Layout(path, tensors, settings, lora_scale, head_dim or 128, drop_misplaced_lora)
    released = layout.result()
    released.unused |= unused
    return released


def load_encoder(encoder: VisionMamba, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Copy an encoder's weights into it; the position embedding is brought to its grid.

    Args:
        encoder: gets the weights, in its own dtypes and on its own device.
        tensors: by the encoder's names, with or without ``visual_encoder.``; tensors of other parts
            of the system (under their prefixes) are not looked at.
    Returns:
        What was loaded and which parameters keep their initial values: none but those that the
        autoregressive files lack, and adapters.
    Raises:
        InputError: no encoder among the tensors, a tensor that is missing, has another shape, or
            has no place in the encoder (the message names it).
    """
    prefixed = any(name.startswith(ENCODER) for name in tensors)
    given = {
        name.removeprefix(ENCODER): tensor
        for name, tensor in tensors.items()
        if name.startswith(ENCODER) or not prefixed
    }
    if "patch_embed.proj.weight" not in given and "layers.0.mixer.in_proj.weight" not in given:
        raise InputError(
            "weights: hold no vision encoder (it did not train, so the file leaves it out); load "
            "those of the stage before first"
        )
    report = LoadReport()
    places = {name: p.data for name, p in encoder.named_parameters()}
    for name in given:
        if name not in places:
            raise InputError(f"weights: tensor {name} has no place in this encoder")
    for name in places:
        if name in given:
            continue
        if name not in ABSENT_IN_STAGE1 and not _is_adapter(name):
            raise InputError(f"weights: tensor {name} of the encoder is missing")
        report.missing.append(name)
    for name, tensor in given.items():
        differs = tensor.shape != places[name].shape
        if name == "pos_embed" and differs and tensor.shape[2:] == (encoder.dim,):
            report.notes.append(
                f"pos_embed: {tensor.shape[1]} rows interpolated to "
                f"{encoder.grid[0]} x {encoder.grid[1]} patches"
            )
            tensor = interpolate_pos_embed(tensor, encoder.grid)
        if tensor.shape != places[name].shape:
            raise InputError(
                f"weights: tensor {name} has shape {tuple(tensor.shape)}, this encoder's is "
                f"{tuple(places[name].shape)}"
            )
        places[name].copy_(tensor)
        report.loaded.append(name)
    return report


def load_released(model: nn.Module, released: ReleasedCheckpoint) -> LoadReport:
    """Copy everything that a weight file holds into a system: encoder, projector, hybrid layers.

    Args:
        model: a `ReportGenerator`, with the adapters and hybrid layers that the file holds.
        released: the weights.
    Raises:
        InputError: as `load_encoder`; also for a projector of another width, or an adapter or
            hybrid layer that the model does not have.
    """
    report = LoadReport()
    rest = dict(released.tensors)
    own = [name for name in rest if name.startswith(ENCODER) and not _is_adapter(name)]
    if own:
        encoder = {name: rest.pop(name) for name in own}
        report = load_encoder(model.visual_encoder, encoder)  # type: ignore[arg-type]
        report.loaded = [f"{ENCODER}{name}" for name in report.loaded]
        report.missing = [f"{ENCODER}{name}" for name in report.missing]
    places = {name: p.data for name, p in model.named_parameters()}
    for name, tensor in rest.items():
        if name not in places:
            hint = ""
            if _is_adapter(name) and released.lora:
                hint = "; add the adapters first: " + ", ".join(
                    f"{key} {value}" for key, value in released.lora.items()
                )
            if ".cross_attn." in name:
                layers = ",".join(map(str, released.hybrid_layers))
                hint = f"; the file has hybrid layers {layers} (--hybrid-layers {layers})"
            raise InputError(f"{released.path}: tensor {name} has no place in this model{hint}")
        if places[name].shape != tensor.shape:
            raise InputError(
                f"{released.path}: tensor {name} has shape {tuple(tensor.shape)}, this model's is "
                f"{tuple(places[name].shape)} (another --llm?)"
            )
        places[name].copy_(tensor)
        report.loaded.append(name)
    done = {*report.loaded, *report.missing}
    report.missing += [name for name in places if _is_adapter(name) and name not in done]
    return report


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file so that a reader finds the old file or the new one, never a half.

    Args:
        path: the file; its folder exists.
        tensors: any device, any strides; tensors that share memory are written apart.
        metadata: text for the header.
    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    path = Path(path)
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        place = plain.untyped_storage().data_ptr()
        if plain.numel() and (place in seen or plain.untyped_storage().nbytes() != plain.nbytes):
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(ready, temporary, dict(metadata or {}))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable (POSIX; elsewhere nothing is to be done)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        InputError: missing, cut short, or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from error


def _read_converted(folder: Path) -> ReleasedCheckpoint:
    if not (folder / CONVERTED_CONFIG).exists():
        raise InputError(
            f"{folder}: holds no {CONVERTED_CONFIG}; give a .pth or .safetensors file, or a folder "
            "that emrrg.convert or emrrg.export wrote"
        )
    config = read_json(folder / CONVERTED_CONFIG)
    if config.get("format") != FORMAT:
        raise InputError(
            f"{folder / CONVERTED_CONFIG}: is not of a folder that emrrg.convert wrote"
        )
    return ReleasedCheckpoint(
        path=folder,
        kind="converted",
        size=config["size"],
        vision=config["vision"],
        tensors=read_safetensors(folder / WEIGHTS),
        lora=config["lora"],
        hybrid_layers=tuple(config["hybrid_layers"]),
        missing=config["missing"],
        unused=config["unused"],
        notes=config["notes"],
        settings=config["settings"],
    )


def _read_pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """The state dict of a ``.pth``, the settings beside it, and why the rest stays behind."""
    file = PickledFile(path)
    content = file.content
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    state, rest = content, {}
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content.get(key), dict):
            state = content[key]
            rest = {k: v for k, v in content.items() if k != key}
            break
    records = {str(k): v for k, v in state.items() if isinstance(v, TensorRecord)}
    if not records:
        raise InputError(f"{path}: holds no tensors (no state dict under 'model' or at the top)")
    settings: dict[str, Any] = {}
    unused = {str(k): "is no tensor" for k in state if str(k) not in records}
    for key, value in rest.items():
        if key in ("config", "args", "hparams", "hyper_parameters") and isinstance(value, dict):
            settings |= _plain(value)
        elif isinstance(value, (str, int, float, bool)):
            settings[str(key)] = value
        elif value is not None:
            unused[str(key)] = "stands beside the model's weights"
    return file.tensors(records), settings, unused


def _plain(value: Any) -> Any:
    """What JSON can hold; anything else by the name of its type."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return f"<{type(value).__name__}>"


def _is_adapter(name: str) -> bool:
    return any(part.startswith(("lora_", "peft_")) for part in name.split("."))


class _Layout:
    """Turns the names of one file into this project's, one concern after another."""

    def __init__(
        self,
        path: Path,
        tensors: dict[str, Tensor],
        settings: dict[str, Any],
        lora_scale: float | None,
        head_dim: int,
        drop_misplaced_lora: bool,
    ) -> None:
        self.path, self.settings = path, settings
        self.lora_scale, self.head_dim = lora_scale, head_dim
        self.drop_misplaced_lora = drop_misplaced_lora
        self.tensors = {_unwrapped(name): tensor for name, tensor in tensors.items()}
        self.unused: dict[str, str] = {}
        self.notes: list[str] = []
        self.ranks: dict[str, set[int]] = {}  # LoRA target: ranks found
        self.scales: set[float] = set()
        self.hybrid: set[int] = set()

    def result(self) -> ReleasedCheckpoint:
        """Do it all."""
        kind = self._kind()
        self._leave_behind()
        if not any(name.startswith((ENCODER, *PROJECTOR, "llama_model.")) for name in self.tensors):
            self.tensors = {f"{ENCODER}{name}": t for name, t in self.tensors.items()}
        self._adapters()
        self._hybrid_layers()
        self._four_directions()
        self._unknown()
        vision = vision_arguments(self.tensors)
        if not self.tensors:
            raise InputError(f"{self.path}: holds nothing of this system")
        lora = None
        if self.ranks:
            ranks = sorted(set().union(*self.ranks.values()))
            if len(ranks) > 1 or len(self.scales) > 1:
                raise InputError(
                    f"{self.path}: adapters of ranks {ranks} and scales {sorted(self.scales)}; one "
                    "of each can be mapped"
                )
            lora = {"targets": sorted(self.ranks), "rank": ranks[0], "scale": self.scales.pop()}
        return ReleasedCheckpoint(
            path=self.path,
            kind=kind,
            size=size_of(vision),
            vision=vision,
            tensors=self.tensors,
            lora=lora,
            hybrid_layers=tuple(sorted(self.hybrid)),
            missing=self._missing(vision),
            unused=self.unused,
            notes=self.notes,
            settings=self.settings,
        )

    def _kind(self) -> str:
        names = self.tensors
        if any(n.startswith(("text_encoder.", "text_proj.", "vision_proj.")) for n in names):
            return "stage2"
        if any(n.startswith((*PROJECTOR, "llama_model.")) for n in names):
            emrrg = any("lora_X" in n or "cross_attn" in n for n in names)
            emrrg |= "lora_X" in self.settings or "use_hybrid_decoder" in self.settings
            return "emrrg" if emrrg else "downstream"
        if any(n.startswith(("dec_block.", "ar_token", "ar_pred.")) for n in names):
            return "stage1"
        has_cls = any(n.removeprefix(ENCODER) == "cls_token" for n in names)
        return "encoder" if has_cls else "stage1"

    def _leave_behind(self) -> None:
        for name in list(self.tensors):
            bare = name.removeprefix(ENCODER)
            for start, why in LEFT_BEHIND.items():
                if bare == start or (start.endswith(".") and bare.startswith(start)):
                    self.unused[name] = why
                    del self.tensors[name]
                    break

    def _adapters(self) -> None:
        """Adapters of Hugging Face PEFT, of MambaPEFT's code, and of this project."""
        for name in list(self.tensors):
            if name not in self.tensors:
                continue  # the partner of one before
            found = re.fullmatch(r"(.*)\.lora_(\w+)\.A", name)
            if found and found[2] in LORA_TARGETS:
                self._own_adapter(found[1], found[2], name)
                continue
            found = re.fullmatch(r"(.*)\.lora_A(?:\.default)?\.weight", name)
            if found:
                self._peft_adapter(found[1], name)
                continue
            found = re.fullmatch(
                r"(.*\.mixer)\.(lora_\w+?)((?:_b|_c|_c_b)?)\.adapter_down\.weight", name
            )
            if found and found[2] in MAMBAPEFT:
                self._mambapeft_adapter(found[1], found[2], found[3], name)

    def _own_adapter(self, layer: str, target: str, name: str) -> None:
        up = self.tensors.get(f"{name[:-1]}B")
        if up is None:
            raise InputError(f"{self.path}: tensor {name} has no B beside it")
        self._store(layer, target, self.tensors[name], up, None, name)

    def _peft_adapter(self, layer: str, name: str) -> None:
        down = self.tensors.pop(name)
        up = self.tensors.pop(name.replace(".lora_A", ".lora_B"), None)
        if up is None:
            raise InputError(f"{self.path}: tensor {name} has no lora_B beside it")
        last = re.sub(r"_(b|c|c_b)$", "", layer.rpartition(".")[2])
        part = "llm" if layer.startswith("llama_model.") else "vis"
        target = {"q_proj": "llm", "v_proj": "llm", "proj": "patch_embed"}.get(last, last)
        rank = down.shape[0]
        alpha = self.settings.get(f"{part}_alpha")
        scale = None if alpha is None else float(alpha) / rank
        self._store(layer, target, down.flatten(1), up.flatten(1), scale, name)

    def _mambapeft_adapter(self, mixer: str, kind: str, suffix: str, name: str) -> None:
        down = self.tensors.pop(name)
        up = self.tensors.pop(name.replace("adapter_down", "adapter_up"), None)
        if up is None:
            raise InputError(f"{self.path}: tensor {name} has no adapter_up beside it")
        module, target = MAMBAPEFT[kind]
        if kind == "lora_X" and 2 * up.shape[0] == down.shape[1]:
            label = f"{mixer}.{kind}"
            if not up.any():
                self.unused[label] = "the release's misplaced adapter, at zero: it does nothing"
            elif self.drop_misplaced_lora:
                self.unused[label] = "the release's misplaced adapter, left behind as asked"
            else:
                raise InputError(f"{self.path}: {label}: {MISPLACED}")
            return
        scale = self.settings.get(f"s_{kind.removeprefix('lora_')}")
        self._store(f"{mixer}.{module}{suffix}", target, down, up, scale, name)

    def _store(
        self, layer: str, target: str, down: Tensor, up: Tensor, scale: Any, name: str
    ) -> None:
        scale = self.lora_scale if self.lora_scale is not None else scale
        if scale is None:
            raise InputError(
                f"{self.path}: tensor {name}: the file does not say its adapters' scale; "
                "emrrg.convert takes it by --lora-scale"
            )
        self.scales.add(float(scale))
        self.ranks.setdefault(target, set()).add(down.shape[0])
        self.tensors[f"{layer}.lora_{target}.A"] = down
        self.tensors[f"{layer}.lora_{target}.B"] = up

    def _hybrid_layers(self) -> None:
        """The release's cross-attention, inside self_attn, to the hybrid layers of this project."""
        for name in list(self.tensors):
            found = re.fullmatch(
                r"(llama_model\.model\.layers\.(\d+))\.self_attn\.(cross_attn_.*)", name
            )
            if not found:
                own = re.fullmatch(r"llama_model\.model\.layers\.(\d+)\.cross_attn\..*", name)
                if own:
                    self.hybrid.add(int(own[1]))
                continue
            tensor = self.tensors.pop(name)
            layer, rest = f"{found[1]}.cross_attn", found[3]
            self.hybrid.add(int(found[2]))
            if rest in ("cross_attn_kv_proj.weight", "cross_attn_kv_proj.bias"):
                self.tensors[f"{layer}.kv_proj.{rest.rpartition('.')[2]}"] = self._keys_values(
                    tensor
                )
            elif rest in ("cross_attn_gate_proj.0.weight", "cross_attn_gate_proj.0.bias"):
                self.tensors[f"{layer}.gate.{rest.rpartition('.')[2]}"] = tensor
            elif rest == "cross_attn_warm_up_gate":
                self.tensors[f"{layer}.alpha"] = tensor.reshape(1)
            else:
                self.unused[name] = "hybrid layer of the release, without a counterpart here"
        incomplete = [
            i for i in sorted(self.hybrid)
            if f"llama_model.model.layers.{i}.cross_attn.alpha" not in self.tensors
            and f"llama_model.model.layers.{i}.cross_attn.gate.weight" in self.tensors
        ]  # fmt: skip
        if incomplete:
            self.notes.append(
                f"hybrid layers {incomplete}: trained without the tanh(alpha) of this project; "
                "alpha is missing"
            )

    def _keys_values(self, tensor: Tensor) -> Tensor:
        """From K and V alternating head by head to all of K, then all of V."""
        rows = tensor.shape[0]
        if rows % (2 * self.head_dim):
            raise InputError(
                f"{self.path}: cross_attn_kv_proj has {rows} rows, which is no multiple of "
                f"2 x {self.head_dim}; say the width of a head"
            )
        heads = tensor.reshape(rows // (2 * self.head_dim), 2, self.head_dim, -1)
        return heads.transpose(0, 1).reshape(tensor.shape).contiguous()

    def _four_directions(self) -> None:
        """Files with one scan direction: the others start as copies of it."""
        if f"{ENCODER}layers.0.mixer.A_log" not in self.tensors:
            return
        if f"{ENCODER}layers.0.mixer.A_c_log" in self.tensors:
            return
        if f"{ENCODER}layers.0.mixer.A_b_log" in self.tensors:
            raise InputError(f"{self.path}: has two scan directions; one or four can be read")
        copied = 0
        for name, tensor in list(self.tensors.items()):
            for k in DIRECTIONS[1:]:
                new = name
                for pattern, to in (
                    (r"\.A_log$", f".A{k}_log"),
                    (r"\.D$", f".D{k}"),
                    (r"\.(conv1d|x_proj|dt_proj)\.", rf".\g<1>{k}."),
                ):
                    new = re.sub(pattern, to, new)
                if new != name:
                    self.tensors[new] = tensor.clone()
                    copied += 1
        self.notes.append(f"one scan direction copied to the other three ({copied} tensors)")

    def _unknown(self) -> None:
        """Encoder tensors that no encoder of this project has."""
        vision = vision_arguments(self.tensors)
        if "depth" not in vision:
            return
        known = _encoder_names(vision)
        for name in list(self.tensors):
            bare = name.removeprefix(ENCODER)
            if name.startswith(ENCODER) and bare not in known and not _is_adapter(bare):
                self.unused[name] = "unknown to this project's encoder"
                del self.tensors[name]
            elif not name.startswith((ENCODER, *PROJECTOR, "llama_model.")):
                self.unused[name] = "unknown to this project"
                del self.tensors[name]

    def _missing(self, vision: Mapping[str, Any]) -> list[str]:
        if "depth" not in vision:
            return [f"{ENCODER}*"]
        names = (f"{ENCODER}{name}" for name in _encoder_names(vision))
        return [name for name in names if name not in self.tensors]


def _unwrapped(name: str) -> str:
    """A name without what wrappers add: DDP, torch.compile, PEFT."""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
    return name.replace("base_model.model.", "").replace(".base_layer.", ".")


def _encoder_names(vision: Mapping[str, Any]) -> list[str]:
    arguments = {k: v for k, v in vision.items() if k != "image_size"}
    with torch.device("meta"):
        return list(VisionMamba(image_size=16, **arguments).state_dict())


def vision_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an encoder's tensors tell of `VisionMamba`'s arguments.

    Args:
        tensors: under this project's names.
    Returns:
        ``dim``, ``depth``, ``state_dim``, ``patch_size``, ``image_size``; fewer, where only the
        projector is there: ``dim`` alone.
    """
    first = tensors.get(f"{ENCODER}layers.0.mixer.A_log")
    if first is None:
        projector = tensors.get("llama_proj.weight")
        return {} if projector is None else {"dim": projector.shape[1]}
    numbers = [
        int(found[1])
        for name in tensors
        if (found := re.match(rf"{re.escape(ENCODER)}layers\.(\d+)\.", name))
    ]
    arguments: dict[str, Any] = {
        "dim": first.shape[0],
        "depth": max(numbers) + 1,
        "state_dim": first.shape[1],
    }
    patches = tensors.get(f"{ENCODER}patch_embed.proj.weight")
    if patches is not None:
        arguments["patch_size"] = patches.shape[-1]
        pos_embed = tensors.get(f"{ENCODER}pos_embed")
        side = 0 if pos_embed is None else int(pos_embed.shape[1] ** 0.5)
        if pos_embed is not None and side * side in (pos_embed.shape[1], pos_embed.shape[1] - 1):
            arguments["image_size"] = side * patches.shape[-1]
    return arguments


def size_of(vision: Mapping[str, Any]) -> str | None:
    """The preset that has these arguments; None where none has."""
    for name, preset in VISION_PRESETS.items():
        if all(preset[key] == vision[key] for key in ("dim", "depth") if key in vision) and vision:
            return name
    return None


def converted_config(released: ReleasedCheckpoint) -> dict[str, Any]:
    """What `emrrg.convert` writes beside the weights."""
    return {
        "format": FORMAT,
        "source": released.path.name,
        "kind": released.kind,
        "size": released.size,
        "vision": released.vision,
        "lora": released.lora,
        "hybrid_layers": list(released.hybrid_layers),
        "missing": released.missing,
        "unused": released.unused,
        "notes": released.notes,
        "settings": json.loads(json.dumps(released.settings)),
    }
