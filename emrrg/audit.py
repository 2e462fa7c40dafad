"""Count a model honestly: ``python -m emrrg.audit --preset large --lora-targets X --lora-rank 16``.

Every parameter with its shape, dtype and bytes, and whether it trains; the share that trains under
each baseline that a percentage could have been measured against, with the paper's 2.3 % taken
apart; and the memory of a training step, parameter-efficient and full side by side. Nothing is
allocated for that: the model and the step are built from shapes alone, so that a 7B language model
is audited on a laptop. ``--measure`` runs a step for real and says how far off the estimate is:
that of encoder and projector, with ``--llm`` the whole system's, as far as the memory goes.

Without ``--llm`` the language model is Llama-2-7B, 4096 wide.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from emrrg.config import parse_config, run_command
from emrrg.decoder import LOSS_CHUNK, Decoder
from emrrg.decoder_config import DecoderConfig, read_decoder_config
from emrrg.errors import InputError
from emrrg.lora import LORA_TARGETS, add_lora
from emrrg.model import set_regime
from emrrg.peft import PEFT_METHODS, adapter_parameter_names, add_peft
from emrrg.vision import VISION_PRESETS, VisionMamba

LLAMA_2_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
PROMPT_TOKENS = 32  # about as many as the prompt has in Llama's vocabulary
REGIMES = ("peft", "encoder", "full")
PARTS = ("encoder", "projector", "language model", "hybrid layers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class AuditConfig:
    """Count parameters, trainable shares and the memory of a training step."""

    preset: Literal["tiny", "base", "large", "huge"] = "large"
    """Size of the vision Mamba."""
    image_size: int | None = None
    """Image side in pixels [default: the preset's]."""
    lora_targets: tuple[str, ...] = ("X",)
    """Where Partial LoRA goes, separated by commas; `none` for no LoRA."""
    lora_rank: int = 16
    """Rank of the adapters."""
    peft: tuple[str, ...] = ()
    """Further methods of emrrg.peft, separated by commas."""
    llm: str | None = None
    """Hugging Face folder of the language model; only its config.json is read [default:
    Llama-2-7B's sizes]."""
    hybrid_every: int = 8
    """Every k-th decoder layer from 0 cross-attends to the image; 0 for none."""
    llm_dtype: Literal["bf16", "fp32"] = "bf16"
    """Type that the frozen language model is stored in; what trains is fp32."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast type of the step."""
    batch_size: int = 6
    """Studies a step."""
    report_tokens: int = 100
    """Report tokens of a study."""
    checkpointing: bool = False
    """Recompute the encoder's blocks and the decoder's layers in the backward pass."""
    measure: bool = False
    """Also run the step (with --llm of the whole system, else of encoder and projector), on CUDA
    where there is one, else on the CPU."""
    json: str | None = None
    """Write everything to this JSON file."""
    markdown: str | None = None
    """Write the tables to this Markdown file."""

    def __post_init__(self) -> None:
        for target in self.lora_targets:
            if target not in LORA_TARGETS:
                raise InputError(
                    f"--lora-targets: {target!r} is not one of {', '.join(LORA_TARGETS)}"
                )
        for method in self.peft:
            if method not in PEFT_METHODS:
                raise InputError(f"--peft: {method!r} is not one of {', '.join(PEFT_METHODS)}")
        for name in ("lora_rank", "batch_size", "report_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: {getattr(self, name)} is below 1")
        if self.hybrid_every < 0:
            raise InputError(f"--hybrid-every: {self.hybrid_every} is below 0")


class System(nn.Module):
    """The parts of a report generator under their names, without a tokenizer.

    Args:
        config: what to build.
        decoder: its sizes; None: no language model, and a projector as wide as Llama-2-7B.
    """

    def __init__(self, config: AuditConfig, decoder: DecoderConfig | None) -> None:
        super().__init__()
        arguments = dict(VISION_PRESETS[config.preset])
        if config.image_size is not None:
            arguments["image_size"] = config.image_size
        self.config = SimpleNamespace(blind=False)
        self.visual_encoder = VisionMamba(**arguments, checkpointing=config.checkpointing)
        width = (decoder or LLAMA_2_7B).hidden_size
        self.llama_proj = nn.Linear(self.visual_encoder.dim, width)
        self.layer_norm = nn.LayerNorm(width)
        if decoder is not None:
            self.llama_model = Decoder(decoder).to(DTYPES[config.llm_dtype])
            self.llama_model.checkpointing = config.checkpointing
            if config.hybrid_every:
                count = decoder.num_hidden_layers
                self.llama_model.add_hybrid_layers(range(0, count, config.hybrid_every))
        targets = [t for t in config.lora_targets if decoder is not None or t != "llm"]
        add_lora(self, targets, rank=config.lora_rank)
        add_peft(self, config.peft)

    def forward(self, images: Tensor, report: Tensor | None = None) -> Tensor:
        """Everything up to the loss's logits: image features, or hidden states of report tokens."""
        vis = self.layer_norm(self.llama_proj(self.visual_encoder(images)))
        if report is None:
            return vis
        embeds = torch.cat([vis.to(report.dtype), report], dim=1)
        text = torch.arange(embeds.shape[1]).expand(len(embeds), -1) >= vis.shape[1]
        return self.llama_model.hidden_states(embeds, vis=vis, text_mask=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; arguments and errors as `emrrg.train.main`."""
    config, _ = parse_config(AuditConfig, argv, "emrrg.audit")
    report = audit(config)
    text = render(report, markdown=False)
    sys.stdout.write(text)
    if config.json is not None:
        Path(config.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if config.markdown is not None:
        Path(config.markdown).write_text(render(report, markdown=True), encoding="utf-8")
    return 0


def audit(config: AuditConfig) -> dict[str, Any]:
    """Everything that the command prints, as JSON holds it."""
    decoder = LLAMA_2_7B
    if config.llm is not None:
        decoder = read_decoder_config(config.llm)
    with torch.device("meta"):
        model = System(config, decoder)
    set_regime(model, "peft")  # type: ignore[arg-type]
    for name in adapter_parameter_names(model):
        model.get_parameter(name).requires_grad_(True)
    groups = parameter_groups(model)
    report: dict[str, Any] = {
        "settings": {
            "preset": config.preset,
            "image_size": list(model.visual_encoder.image_size),
            "lora_targets": list(config.lora_targets),
            "lora_rank": config.lora_rank,
            "peft": list(config.peft),
            "llm": config.llm or "Llama-2-7B",
            "llm_given": config.llm is not None,
            "llm_width": decoder.hidden_size,
            "hybrid_layers": list(model.llama_model.config.hybrid_layers),
            "batch_size": config.batch_size,
            "report_tokens": config.report_tokens,
            "precision": config.precision,
            "checkpointing": config.checkpointing,
        },
        "parameters": groups,
        "shares": shares(groups),
        "paper": paper_arithmetic(),
        "memory": memory(config, decoder),
    }
    if config.measure:
        report["measured"] = measured(config, report["memory"])
    return report


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters by name with layer numbers as ``*``: shape, how many, elements, dtype, bytes."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        key = (pattern, tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
        group = groups.setdefault(
            key,
            {
                "name": pattern,
                "part": part_of(name),
                "hook_sees": hook_sees(name),
                "shape": list(parameter.shape),
                "tensors": 0,
                "parameters": 0,
                "trainable": parameter.requires_grad,
                "dtype": str(parameter.dtype).removeprefix("torch."),
                "bytes": 0,
                "added": is_added(name),
            },
        )
        group["tensors"] += 1
        group["parameters"] += parameter.numel()
        group["bytes"] += parameter.numel() * parameter.element_size()
    return list(groups.values())


def part_of(name: str) -> str:
    """The part of the system that a parameter belongs to."""
    if name.startswith("visual_encoder."):
        return "encoder"
    if name.startswith(("llama_proj.", "layer_norm.")):
        return "projector"
    return "hybrid layers" if ".cross_attn." in name else "language model"


def is_added(name: str) -> bool:
    """Whether an adaptation method added a parameter to the base."""
    return any(part.startswith(("lora_", "peft_")) for part in name.split("."))


def hook_sees(name: str) -> bool:
    """Whether a counter that hooks modules sees a parameter of the encoder.

    A fused mixer reads its layers' weights without calling them, and `cls_token` and `pos_embed`
    belong to no leaf module, so such a counter misses a third of the encoder.
    """
    return ".mixer." not in name and not name.endswith(("cls_token", "pos_embed"))


def shares(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Trainable parameters over every baseline that a share could be measured against.

    A baseline does not count what the method added, except where it says so.
    """
    groups = list(groups)

    def count(keep: Callable[[Mapping[str, Any]], bool]) -> int:
        return sum(g["parameters"] for g in groups if keep(g))

    adapters = count(lambda g: g["trainable"] and g["part"] in ("encoder", "language model"))
    projector = count(lambda g: g["part"] == "projector")
    hybrid = count(lambda g: g["part"] == "hybrid layers")
    encoder = count(lambda g: g["part"] == "encoder" and not g["added"])
    visible = count(lambda g: g["part"] == "encoder" and not g["added"] and g["hook_sees"])
    llm = count(lambda g: g["part"] == "language model" and not g["added"])
    added = count(lambda g: g["added"])
    numerators = {
        "adapters": adapters,
        "adapters + projector": adapters + projector,
        "adapters + projector + hybrid layers": adapters + projector + hybrid,
    }
    baselines = {
        "encoder": encoder,
        "encoder + projector": encoder + projector,
        "what a hook-based counter sees + projector": visible + projector,
        "whole system": encoder + projector + hybrid + llm + added,
    }
    return {
        "numerators": numerators,
        "baselines": baselines,
        "percent": {
            top: {bottom: 100 * over / under for bottom, under in baselines.items()}
            for top, over in numerators.items()
        },
        "added": added,
    }


def paper_arithmetic() -> dict[str, Any]:
    """Where the paper's 2.3 % comes from: large, rank 16, Llama-2-7B's width."""
    dim, depth, rank, width = 1024, 24, 16, 4096
    with torch.device("meta"):
        encoder = VisionMamba(**VISION_PRESETS["large"])
    whole = sum(p.numel() for p in encoder.parameters())
    visible = sum(p.numel() for n, p in encoder.named_parameters() if hook_sees(n))
    projector = dim * width + width + 2 * width
    release, correct = depth * rank * (dim + dim // 2), depth * rank * (dim + dim)
    return {
        "projector": projector,
        "encoder": whole,
        "encoder_seen_by_hooks": visible,
        "release_adapter": release,
        "correct_adapter": correct,
        "release_percent": 100 * (release + projector) / (visible + projector),
        "correct_percent": 100 * (correct + projector) / (visible + projector),
        "true_percent": 100 * (correct + projector) / (whole + projector),
        "claimed_percent": 2.3,
    }


def memory(config: AuditConfig, decoder: DecoderConfig) -> dict[str, Any]:
    """Bytes of a step by regime: weights, gradients, optimizer state, activations.

    Activations are what autograd keeps between forward and backward, counted tensor by tensor on a
    step without data; with checkpointing the backward pass also holds one block or layer at a time.
    Temporaries inside operations are not in it.
    """
    result: dict[str, Any] = {}
    for regime in REGIMES:
        with torch.device("meta"):
            model = System(config, decoder)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            prepare(model, regime)
            images, embeds = batch(model, config, decoder, torch.device("cpu"))
            whole = kept_bytes(model, partial(step, model, config, images, embeds))
            vision = kept_bytes(model, partial(step, model, config, images, None))
            trainable = [p for p in model.parameters() if p.requires_grad]
            row = {
                "trainable": sum(p.numel() for p in trainable),
                "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
                "gradients": sum(p.numel() * p.element_size() for p in trainable),
                "optimizer": sum(2 * p.numel() * p.element_size() for p in trainable),
                "activations": whole,
                "activations_of_encoder_and_projector": vision,
                "recomputed": recomputed(model, config, images, embeds),
                "logits": min(
                    LOSS_CHUNK, config.batch_size * config.report_tokens * decoder.vocab_size
                )
                * 4,
            }
        row["total"] = sum(
            row[key]
            for key in ("weights", "gradients", "optimizer", "activations", "recomputed", "logits")
        )
        result[regime] = row
    return result


def prepare(model: System, regime: str) -> None:
    """Decide what trains, and store it in fp32."""
    set_regime(model, regime)  # type: ignore[arg-type]
    if regime == "peft":
        for name in adapter_parameter_names(model):
            model.get_parameter(name).requires_grad_(True)
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def step(model: System, config: AuditConfig, images: Tensor, report: Tensor | None) -> Tensor:
    """The forward pass of a training step, under autocast where asked for."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return model(images, report)


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that `run` keeps for the backward pass, apart from the parameters, each memory once."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = (tensor, storage.nbytes())  # the tensor keeps the address taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(size for _, size in kept.values())


def recomputed(model: System, config: AuditConfig, images: Tensor, report: Tensor | None) -> int:
    """Bytes that the backward pass of a checkpointed block or decoder layer computes again.

    The larger of an average block of the encoder and an average layer of the decoder.
    """
    if not config.checkpointing:
        return 0
    parts: list[Any] = [model.visual_encoder]
    if report is not None:
        parts.append(model.llama_model)
    for part in parts:
        part.checkpointing = False
    vision = kept_bytes(model, lambda: step(model, config, images, None))
    largest = vision // model.visual_encoder.depth
    if report is not None:
        both = kept_bytes(model, lambda: step(model, config, images, report))
        largest = max(largest, (both - vision) // len(model.llama_model.model.layers))
    for part in parts:
        part.checkpointing = True
    return largest


def measured(config: AuditConfig, estimate: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Run one step in each regime, each in a process of its own.

    Args:
        config: what to build; with `llm` the whole system, else encoder and projector.
        estimate: from `memory`; a whole system that needs more than there is free is not built.
    """
    context = multiprocessing.get_context("spawn")
    free = free_memory() if config.llm is not None else None
    if free is not None:
        free = free * 9 // 10  # temporaries
    result: dict[str, Any] = {}
    for regime in REGIMES[::2]:
        needed = estimate[regime]["total"]
        if free is not None and needed > free:
            reason = f"needs about {gibibytes(needed)}, and {gibibytes(free)} are free"
            result[regime] = {"skipped": reason}
            continue
        queue = context.Queue()
        process = context.Process(target=measure_step, args=(config, regime, queue))
        process.start()
        process.join()
        if process.exitcode or queue.empty():
            raise InputError(
                f"--measure: the {regime} step ended with status {process.exitcode}; a smaller "
                "--batch-size may fit"
            )
        result[regime] = queue.get()
    return result


def measure_step(config: AuditConfig, regime: str, queue: Any) -> None:
    """A warm step, then a measured one: bytes kept, and the peak above weights and state."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    decoder = None if config.llm is None else read_decoder_config(config.llm)
    torch.manual_seed(0)
    with torch.device("meta"):  # in the types asked for from the start
        model = System(config, decoder)
    model.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    height, width = model.visual_encoder.image_size
    model.visual_encoder.resize((height, width))  # its orders of visiting
    prepare(model, regime)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    inputs = batch(model, config, decoder, device)

    def forward_backward(images: Tensor, report: Tensor | None) -> None:
        step(model, config, images, report).float().square().mean().backward()

    images, report = inputs
    forward_backward(images[:1], None if report is None else report[:1])  # kernels, gradients
    optimizer.step()
    estimate, again = _fake_bytes(config, regime, decoder)
    real = kept_bytes(model, lambda: step(model, config, *inputs))
    peak: int | None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(*inputs)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        resident = _reset_peak()
        forward_backward(*inputs)
        peak = None if resident is None else _status("VmHWM") - resident
    queue.put(
        {
            "device": torch.cuda.get_device_name() if cuda else "CPU",
            "torch": torch.__version__,
            "estimated_kept": estimate,
            "estimated_peak": estimate + again,
            "kept": real,
            "peak_above_weights": peak,
        }
    )


def batch(
    model: System, config: AuditConfig, decoder: DecoderConfig | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Random images (B, 3, S, S) and, with a decoder, embeddings of prompt and report (B, T, H)."""
    studies = config.batch_size
    images = torch.randn(studies, 3, *model.visual_encoder.image_size, device=device)
    if decoder is None:
        return images, None
    shape = (studies, PROMPT_TOKENS + config.report_tokens, decoder.hidden_size)
    return images, torch.randn(shape, device=device).to(DTYPES[config.llm_dtype])


def _fake_bytes(config: AuditConfig, regime: str, decoder: DecoderConfig | None) -> tuple[int, int]:
    """Bytes kept, and computed again, by a step without data."""
    with torch.device("meta"):
        model = System(config, decoder)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        prepare(model, regime)
        inputs = batch(model, config, decoder, torch.device("cpu"))
        kept = kept_bytes(model, lambda: step(model, config, *inputs))
        return kept, recomputed(model, config, *inputs)


def free_memory() -> int | None:
    """Bytes that are free where a step would run; None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _reset_peak() -> int | None:
    """Forget the process's peak memory (Linux); its present memory in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def render(report: Mapping[str, Any], *, markdown: bool) -> str:
    """The tables as text or as Markdown."""
    settings = report["settings"]
    title = (
        f"{settings['preset']} at {' x '.join(map(str, settings['image_size']))} pixels; adapters "
        f"{', '.join([*settings['lora_targets'], *settings['peft']]) or 'none'} (rank "
        f"{settings['lora_rank']}); language model {settings['llm']}, {settings['llm_width']} wide"
    )
    sections = [
        ("Parameters", parameter_table(report["parameters"])),
        ("Share that trains", share_table(report["shares"])),
        ("The paper's 2.3 %", paper_table(report["paper"])),
        (
            f"A training step: {settings['batch_size']} studies, {settings['report_tokens']} "
            f"report tokens, {settings['precision']}",
            memory_table(report["memory"]),
        ),
    ]
    if "measured" in report:
        what = "the whole step" if settings["llm_given"] else "encoder and projector"
        sections.append((f"Measured: {what}", measured_table(report["measured"])))
    heading = "## " if markdown else ""
    lines = [f"# {title}" if markdown else title]
    for name, rows in sections:
        lines += ["", f"{heading}{name}", "", *layout(rows, markdown=markdown)]
    return "\n".join(lines) + "\n"


def parameter_table(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row a group, and a total a part."""
    rows = [["part", "parameter", "shape", "tensors", "parameters", "trains", "dtype", "bytes"]]
    for part in PARTS:
        mine = [g for g in groups if g["part"] == part]
        for g in mine:
            rows.append(
                [
                    part,
                    g["name"],
                    " x ".join(map(str, g["shape"])),
                    str(g["tensors"]),
                    f"{g['parameters']:,}",
                    "yes" if g["trainable"] else "-",
                    g["dtype"],
                    f"{g['bytes']:,}",
                ]
            )
        if mine:
            total = sum(g["parameters"] for g in mine)
            trained = sum(g["parameters"] for g in mine if g["trainable"])
            size = sum(g["bytes"] for g in mine)
            rows.append([part, "total", "", "", f"{total:,}", f"{trained:,}", "", f"{size:,}"])
    return rows


def share_table(found: Mapping[str, Any]) -> list[list[str]]:
    """Numerators down, baselines across."""
    baselines = found["baselines"]
    rows = [["trains", "parameters", *(f"of {name}" for name in baselines)]]
    rows.append(["", "", *(f"{count:,}" for count in baselines.values())])
    for name, count in found["numerators"].items():
        # A hybrid layer of a large language model is no share of a small encoder.
        cells = (f"{p:.3f} %" if p <= 100 else "-" for p in found["percent"][name].values())
        rows.append([name, f"{count:,}", *cells])
    return rows


def paper_table(paper: Mapping[str, Any]) -> list[list[str]]:
    """The sums behind the figure, and what they should have been (large, rank 16, width 4096)."""
    outside = paper["encoder_seen_by_hooks"] + paper["projector"]
    whole = paper["encoder"] + paper["projector"]
    return [
        ["what", "trains", "over", "share"],
        [
            "the release: half-width adapter, projector and norm, over the modules that a "
            "hook-based counter sees and projector and norm",
            f"{paper['release_adapter']:,} + {paper['projector']:,}",
            f"{outside:,}",
            f"{paper['release_percent']:.3f} %",
        ],
        [
            "the adapter that the paper describes, over the same",
            f"{paper['correct_adapter']:,} + {paper['projector']:,}",
            f"{outside:,}",
            f"{paper['correct_percent']:.3f} %",
        ],
        [
            "the same, over the whole encoder and projector",
            f"{paper['correct_adapter']:,} + {paper['projector']:,}",
            f"{whole:,}",
            f"{paper['true_percent']:.3f} %",
        ],
    ]


def memory_table(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Bytes down, regimes across."""
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "AdamW state",
        "activations": "activations kept for the backward pass",
        "activations_of_encoder_and_projector": "  of these, encoder and projector",
        "recomputed": "computed again at once, with checkpointing",
        "logits": "logits of a chunk of the loss",
        "total": "total",
    }
    rows = [["", *found]]
    rows.append(["parameters that train", *(f"{row['trainable']:,}" for row in found.values())])
    rows += [
        [label, *(gibibytes(row[key]) for row in found.values())] for key, label in names.items()
    ]
    return rows


def measured_table(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The estimate beside what a step really kept, and its peak."""
    rows = [
        [
            "regime", "device", "estimated to be kept", "kept", "estimate / kept",
            "estimated peak", "peak above weights and state", "estimate / peak",
        ]
    ]  # fmt: skip
    for regime, row in found.items():
        if "skipped" in row:
            rows.append([regime, f"not measured: {row['skipped']}", *[""] * 6])
            continue
        peak = row["peak_above_weights"]
        rows.append(
            [
                regime,
                f"{row['device']}, torch {row['torch']}",
                gibibytes(row["estimated_kept"]),
                gibibytes(row["kept"]),
                f"{row['estimated_kept'] / row['kept']:.3f}",
                gibibytes(row["estimated_peak"]),
                "not measured here" if peak is None else gibibytes(peak),
                "" if not peak else f"{row['estimated_peak'] / peak:.3f}",
            ]
        )
    return rows


def gibibytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.3f} GiB"


def layout(rows: Sequence[Sequence[str]], *, markdown: bool) -> list[str]:
    """Rows as aligned text, or as a Markdown table; the first row is the head."""
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if re.match(r"-?[\d]", cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    run_command(main)
