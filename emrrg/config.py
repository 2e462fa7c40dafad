"""Configurations as frozen dataclasses: the command line, JSON files, and presets by recipe.

Every flag of a command is a field of one dataclass: the field's name is the flag's name
(``lora_rank`` -> ``--lora-rank``), the string under the field is its help, and `__post_init__`
checks the values in the words of the flags. Precedence, weakest first: the dataclass's default,
the recipe, ``--config FILE``, the flags themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import docstring_parser

from emrrg.errors import InputError

ConfigT = TypeVar("ConfigT")

LORA_TARGETS = (
    "X", "Z", "dt_in", "B", "C", "in_proj", "out_proj", "x_proj", "dt_proj", "patch_embed", "llm",
)  # fmt: skip
PEFT_METHODS = (
    "additional-scan", "affix", "affix-projected", "bias", "delta-A", "delta-D", "delta-conv1d",
    "delta-bias", "parallel-adapter", "prompt", "prompt-projected",
)  # fmt: skip

RENAMED = {"beams": "num_beams"}
"""Earlier names of fields, which files and command lines may still use."""
METAVARS = {"device": "DEVICE", "split": "NAME", "train_flags": "FLAGS"}
"""What stands for the value in ``--help`` where a text is no path."""

PROMPT = (
    "Human: <Img>",
    "</Img> Generate a comprehensive and detailed diagnosis report for this chest xray image. "
    "\nAssistant:",
)


@dataclass(frozen=True)
class TrainConfig:
    """Train a report generator; without arguments, the whole mission in small on synthetic data."""

    recipe: Literal["phantoms", "iu_xray", "mimic_cxr", "chexpert_plus"] | None = None
    """A preset of every flag below: the synthetic demonstration (default where no --dataset is
    given), or the paper's recipe for a data set."""

    dataset: Literal["phantoms", "iu_xray", "mimic_cxr", "chexpert_plus", "custom"] | None = None
    """What the data is; all but phantoms need --annotation and --images."""
    annotation: str | None = None
    """Annotation file in R2Gen's JSON format ({"train": [{"id", "report", "image_path"}], ...})."""
    images: str | None = None
    """Folder that the annotation's image paths start from."""
    fit: Literal["stretch", "pad"] = "stretch"
    """How an image becomes a square: resized straight, as the released models expect, or with its
    proportions kept, on a black ground."""
    clean: Literal["auto", "iu_xray", "mimic_cxr", "plain", "none"] = "auto"
    """How reports are prepared: R2Gen's cleaner for a data set, the same form without its
    accidents, or not at all; auto: by --dataset (mimic_cxr for CheXpert Plus, plain for custom)."""
    marks: Literal["keep", "drop", "mask"] = "keep"
    """What becomes of de-identification marks (XXXX, ___): kept to the cleaner, dropped, or each
    one `xxxx`."""
    domain: Literal["source", "target"] = "target"
    """Phantoms only: which synthetic hospital."""
    train_studies: int | None = None
    """Use at most this many training studies (phantoms: draw this many)."""
    val_studies: int | None = None
    """Use at most this many validation studies (phantoms: draw this many)."""
    test_studies: int | None = None
    """Use at most this many test studies (phantoms: draw this many)."""
    source_studies: int = 10000
    """Phantoms recipe: training studies of the source hospital in stage (a)."""
    source_epochs: int = 3
    """Phantoms recipe: epochs of stage (a)."""
    source_lr: float = 2e-3
    """Phantoms recipe: learning rate of stage (a)."""
    source_steps: int | None = None
    """Phantoms recipe: stop stage (a) after this many steps."""

    preset: Literal["tiny", "base", "large", "huge"] | None = None
    """Size of the vision Mamba [default: tiny, or what --vision-checkpoint holds]."""
    image_size: int | None = None
    """Image side in pixels, a multiple of 16 [default: 80 for tiny, else 224]."""
    drop_path: float | None = None
    """Stochastic depth: the rate at which the encoder's last block drops its branches [default:
    0.1, or that of --init]."""
    regime: Literal["peft", "full", "encoder", "linear-probe"] | None = None
    """What trains. peft: adapters, projector, hybrid layers; full: everything; encoder: encoder,
    projector, hybrid layers; linear-probe: projector alone. [default: peft on trained weights
    (--init, or --vision-checkpoint with --llm), else full]."""
    init: str | None = None
    """Start from the weights of this earlier run."""
    vision_checkpoint: str | None = None
    """Released encoder weights (.pth, or a converted folder or .safetensors)."""
    llm: str | None = None
    """Hugging Face folder of a Llama-style model; without it a small decoder is trained."""
    llm_int8: bool = False
    """Hold the linear weights of the --llm in int8, frozen: a quarter of fp32's memory."""
    tokenizer: str | None = None
    """Tokenizer file [default: the --llm folder's, or one trained on the training reports]."""
    vocab_size: int = 768
    """Pieces of the tokenizer that is trained where none is given."""
    decoder_dim: int = 128
    """Width of the small decoder that is trained where no --llm is given."""
    decoder_layers: int = 4
    """Layers of the small decoder."""
    decoder_heads: int = 4
    """Attention heads of the small decoder."""

    lora_targets: tuple[str, ...] = ("X",)
    """Where Partial LoRA goes, separated by commas: X, Z, dt_in, B, C, in_proj, out_proj, x_proj,
    dt_proj, patch_embed, llm; `none` for no LoRA."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_scale: float = 1.0
    """Scale s of the adapters (no alpha / r)."""
    lora_dropout: float = 0.1
    """Dropout on the rank-r product."""
    peft: tuple[str, ...] = ()
    """Further methods beside LoRA, separated by commas: additional-scan, affix, affix-projected,
    bias, delta-A, delta-D, delta-conv1d, delta-bias, parallel-adapter, prompt, prompt-projected."""
    extra_states: int = 6
    """additional-scan: further states a channel."""
    affix_tokens: int = 3
    """affix: tokens of each layer and scan order."""
    prompt_tokens: int = 8
    """prompt: tokens beside the image's."""
    adapter_dim: int = 32
    """parallel-adapter: its width."""
    adapter_scale: float = 0.1
    """parallel-adapter: its scale."""
    hybrid_every: int | None = None
    """Every k-th decoder layer from 0 cross-attends to the image; 0 for none [default: 8; 2 for the
    small decoder]."""
    hybrid_layers: tuple[int, ...] | None = None
    """These decoder layers cross-attend to the image, separated by commas (instead of
    --hybrid-every)."""
    hybrid_gate: Literal["token", "channel"] = "token"
    """Gate of the hybrid layers: a scalar a token, or one a channel."""
    blind: bool = False
    """Control experiment: every image's features are replaced by their mean over the training
    images, so that only the language can be learned."""

    epochs: int = 10
    """Passes over the training studies."""
    max_steps: int | None = None
    """Stop after this many optimizer steps."""
    batch_size: int = 16
    """Studies that a process takes through the model at once; a step takes --accumulate times as
    many in each process."""
    auto_batch: bool = False
    """Find the largest batch that fits before training, and train with it (at most 512)."""
    accumulate: int = 1
    """Batches whose gradients make one optimizer step."""
    bucket: bool = True
    """Put reports of like length into a batch (in a random order that the seed decides)."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.01
    """Weight decay of matrices."""
    beta2: float = 0.95
    """Decay of AdamW's second moment (torch's own is 0.999)."""
    decay_all: bool = False
    """Decay norms, biases, A_log, D and embeddings too, as the paper's recipe does."""
    schedule: Literal["cosine", "epoch-cosine"] = "cosine"
    """Cosine stepped every step, or every epoch (the paper)."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 for no clipping."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto is bf16 on CUDA and fp32 on the CPU."""
    compile: bool = False
    """Compile the encoder's blocks and the decoder's layers with torch.compile. What it makes of
    them can depend on the shapes that come first and on its cache: the last bits of a run that goes
    on may differ."""
    checkpointing: bool = False
    """Keep only the input of each encoder block and decoder layer, and compute the rest again in
    the backward pass."""
    cache_features: bool = True
    """Where the encoder is frozen and bare of adapters: encode each training image once, if the
    features take less than 2 GiB."""
    shard_llm: bool = False
    """Several processes: shard the frozen language model over them (FSDP2) where it does not fit on
    one."""
    max_report_tokens: int = 100
    """Longer reports are cut to this many tokens in training (the end mark is kept)."""

    num_beams: int = 3
    """Beams of the search at validation and test."""
    min_new_tokens: int = 1
    """Shortest generated report, in tokens."""
    max_new_tokens: int = 120
    """Longest generated report, in tokens."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already generated become less likely."""
    length_penalty: float = 1.0
    """Above 1, longer beams are preferred."""
    eval_batch_size: int = 32
    """Studies a generation batch."""
    eval_every: int = 1
    """Validate by generation every so many epochs (and at the last); 0 for never: then the last
    weights are the best."""
    select_bleu4: float = 0.8
    """Weight of BLEU-4 in the score by which the best weights are chosen."""
    select_cider: float = 0.2
    """Weight of CIDEr in it."""
    patience: int = 0
    """Stop after this many validations without a better score; 0: never."""
    protocol: Literal["full", "r2gen", "r2gengpt"] = "full"
    """Scoring protocol: full references, or a peer's truncation."""

    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    threads: int | None = None
    """CPU threads [default: torch's]."""
    workers: int | None = None
    """Processes that decode images [default: 0 on the CPU, else up to 8]."""
    seed: int = 42
    """Seed of the weights, the data order, dropout and the phantoms."""
    deterministic: bool = False
    """Only operations that give the same bits every time on one device (on the CPU they all do);
    what has no such form ends the run."""
    output: str | None = None
    """Run folder [default: runs/<recipe or data set>, numbered where that exists]."""
    resume: str | None = None
    """Go on with this run folder, from its last checkpoint, with its configuration; only --epochs,
    --patience, --device, --threads, --workers, --log-every, --save-every, --keep-last, --bad-steps
    and --tensorboard may be given beside it."""
    log_every: int = 10
    """Steps between log lines."""
    save_every: int = 200
    """Steps between checkpoints (and at every epoch's end)."""
    keep_last: int = 1
    """Checkpoints kept, the newest ones, beside the best."""
    bad_steps: int = 10
    """Stop after this many steps in a row whose loss is not finite."""
    bad_images: Literal["fail", "skip"] = "fail"
    """What a broken image does: end the run, or be named, counted and left out."""
    dry_run: bool = False
    """Build everything, run two steps and one generation, print what they took, and leave
    nothing."""
    tensorboard: bool = False
    """Also write the curves for TensorBoard (the extra `tensorboard`)."""

    def __post_init__(self) -> None:
        if self.dataset not in (None, "phantoms"):
            for name in ("annotation", "images"):
                if getattr(self, name) is None:
                    raise InputError(f"--{name}: needed with --dataset {self.dataset}")
        if self.dataset in (None, "phantoms") and (self.annotation or self.images):
            raise InputError("--annotation and --images: say --dataset iu_xray (or custom) as well")
        for target in self.lora_targets:
            if target not in LORA_TARGETS:
                raise InputError(
                    f"--lora-targets: {target!r} is not one of {', '.join(LORA_TARGETS)}"
                )
        for method in self.peft:
            if method not in PEFT_METHODS:
                raise InputError(f"--peft: {method!r} is not one of {', '.join(PEFT_METHODS)}")
        for name in (
            "epochs", "batch_size", "eval_batch_size", "lora_rank", "vocab_size", "decoder_dim",
            "decoder_layers", "decoder_heads", "max_report_tokens", "num_beams", "max_new_tokens",
            "log_every", "save_every", "keep_last", "bad_steps", "source_studies", "source_epochs",
            "threads", "source_steps", "max_steps", "train_studies", "val_studies", "test_studies",
            "accumulate", "extra_states", "affix_tokens", "prompt_tokens", "adapter_dim",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{flag(name)}: {value} is not at least 1")
        for name in ("lr", "source_lr", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise InputError(f"{flag(name)}: {getattr(self, name)} is not above 0")
        for name in (
            "min_lr", "weight_decay", "grad_clip", "warmup_steps", "min_new_tokens", "eval_every",
            "workers", "hybrid_every", "patience", "select_bleu4", "select_cider",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{flag(name)}: {value} is below 0")
        for name in ("lora_dropout", "drop_path"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise InputError(f"{flag(name)}: {getattr(self, name)} is not in [0, 1)")
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"--min-new-tokens: {self.min_new_tokens} is above "
                f"--max-new-tokens {self.max_new_tokens}"
            )
        if self.image_size is not None and (self.image_size < 16 or self.image_size % 16):
            raise InputError(f"--image-size: {self.image_size} is not a multiple of 16")
        if self.decoder_dim % self.decoder_heads or (self.decoder_dim // self.decoder_heads) % 2:
            raise InputError(
                f"--decoder-dim: {self.decoder_dim} does not give {self.decoder_heads} heads "
                "of an even width (--decoder-heads)"
            )
        if self.hybrid_every is not None and self.hybrid_layers is not None:
            raise InputError("--hybrid-every and --hybrid-layers: give one of them")
        if self.llm_int8 and self.llm is None and self.init is None:
            raise InputError("--llm-int8: needs --llm, the small decoder trains in full precision")


@dataclass(frozen=True)
class ModelConfig:
    """What `emrrg.model.ReportGenerator` is built from; stored in ``base/model.json`` of a run."""

    image_size: int = 128
    """Pixels a side."""
    patch_size: int = 16
    """Pixels a side of a patch."""
    fit: Literal["stretch", "pad"] = "stretch"
    """How an image becomes a square, as `emrrg.data.images.load_image` has it."""
    dim: int = 128
    """Width of the vision Mamba."""
    depth: int = 4
    """Blocks of the vision Mamba."""
    state_dim: int = 16
    """States a channel of the scan."""
    drop_path: float = 0.1
    """Rate of stochastic depth in the last block while training."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """Fields of `emrrg.decoder.DecoderConfig`."""
    llm: str | None = None
    """Folder that the decoder's frozen weights are read from; None: stored with the run."""
    llm_int8: bool = False
    """Whether they are held in int8."""
    lora_targets: tuple[str, ...] = ()
    """Targets of Partial LoRA; none: no adapters."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_scale: float = 1.0
    """Scale of the adapters."""
    lora_dropout: float = 0.1
    """Dropout on the rank-r product."""
    peft: tuple[str, ...] = ()
    """Further methods of `emrrg.peft`."""
    peft_settings: dict[str, Any] = field(default_factory=dict)
    """Fields of `emrrg.peft.PeftSettings`."""
    prompt: tuple[str, str] = PROMPT
    """Text before and after the image tokens."""
    max_report_tokens: int = 100
    """Report tokens in training, without the end mark."""
    blind: bool = False
    """Every image's features are replaced by their mean over the training images."""


def flag(name: str) -> str:
    """The command-line spelling of a field: ``lora_rank`` -> ``--lora-rank``."""
    return "--" + name.replace("_", "-")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as a dictionary that JSON can hold (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """Build a dataclass from JSON values, lists becoming tuples.

    Args:
        cls: the dataclass.
        values: field name to value.
        where: the file that the values come from, for messages.
    Raises:
        InputError: an unknown key, one that is missing, or a value that the class refuses.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = _present_names(cls, values)
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{where}: unknown key {name!r}")
        _check_type(value, hints[name], f"{where}: {name}")
    for name, item in known.items():
        required = item.default is item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{where}: key {name!r} is missing")
    clean = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**clean)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, unreadable, or not a JSON object (the message names it).
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def check_writable(path: Path, name: str) -> None:
    """Find out before the work, not after it, that a file cannot be written; makes its folder.

    Raises:
        InputError: it cannot (the message begins with the flag's name).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, "ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise InputError(f"{name}: {path} cannot be written ({error.strerror})") from error


def parse_config(
    cls: type[ConfigT],
    argv: Sequence[str] | None,
    prog: str,
    presets: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    positional: Sequence[str] = (),
) -> tuple[ConfigT, dict[str, Any]]:
    """Read a command line into a frozen dataclass.

    Args:
        cls: the dataclass; its fields are the flags.
        argv: arguments without the program's name; None: `sys.argv`.
        prog: name shown in usage and errors.
        presets: from the values given by the user to the values that a recipe suggests.
        positional: fields given by position instead of by flag.
    Returns:
        The configuration, and the values that the user gave (file and flags).
    Raises:
        InputError: an unknown flag or value, an unknown key in ``--config``.
    """
    parser = _Parser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="JSON file with values for these flags")
    help_texts = _attribute_docs(cls)
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        _add_argument(parser, item, hints[item.name], help_texts, item.name in positional)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    if path is not None:
        values = _present_names(cls, read_json(path))
        from_file = {k: v for k, v in values.items() if k not in given}
        places = {name: given[name] for name in positional}
        from_dict(cls, {**_defaults(cls), **places, **values}, str(path))
        given = {**from_file, **given}
    suggested = dict(presets(given)) if presets else {}
    return from_dict(cls, {**_defaults(cls), **suggested, **given}, prog), given


def run_command(main: Callable[[Sequence[str] | None], int | None]) -> typing.NoReturn:
    """Run a command's `main`; what the user can mend becomes one line and exit status 2."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.stem == "__main__" else program.stem
    name = "emrrg" if name == "emrrg" else f"emrrg.{name}"
    try:
        status = main(None)
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{name}: error: {where}{error.strerror or error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, raised so that `main` stays importable."""

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message.removeprefix("argument "))


def _present_names(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under the names that their fields have now."""
    known = {f.name for f in dataclasses.fields(cls)}
    return {RENAMED[k] if RENAMED.get(k) in known else k: v for k, v in values.items()}


def _defaults(cls: type) -> dict[str, Any]:
    return {
        f.name: f.default_factory() if callable(f.default_factory) else f.default
        for f in dataclasses.fields(cls)
        if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
    }


def _attribute_docs(cls: type) -> dict[str, str]:
    """Help of each field: the string that stands under it in the class body."""
    parsed = docstring_parser.parse_from_object(cls)
    return {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the hint itself where it is none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _add_argument(
    parser: argparse.ArgumentParser,
    item: dataclasses.Field[Any],
    hint: Any,
    help_texts: Mapping[str, str],
    positional: bool,
) -> None:
    """One field as one flag: Literal -> choices, bool -> --x / --no-x, tuple -> commas."""
    text = help_texts.get(item.name, "").replace("%", "%%")
    default = item.default
    if default not in (None, False, dataclasses.MISSING) and default != ():
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" [default: {shown}]"
    kind = next(t for t in _alternatives(hint) if t is not type(None))
    options: dict[str, Any] = {"help": text}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is Literal:
        options["choices"] = typing.get_args(kind)
    elif typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        if positional:
            options |= {"type": element, "nargs": "*"}
        else:
            options |= {"type": _comma_list(element), "metavar": "A,B,..."}
    else:
        options["type"] = kind
        if not positional:
            text_of = "NAME" if item.name.endswith("_column") else METAVARS.get(item.name, "PATH")
            options["metavar"] = {int: "N", float: "X"}.get(kind, text_of)
    if positional:
        parser.add_argument(item.name, **options)
        return
    options |= {"dest": item.name, "default": argparse.SUPPRESS}
    parser.add_argument(flag(item.name), **options)
    for old in (old for old, new in RENAMED.items() if new == item.name):
        parser.add_argument(flag(old), **options | {"help": argparse.SUPPRESS})


def _comma_list(element: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        if text in ("", "none"):
            return ()
        return tuple(element(part.strip()) for part in text.split(","))

    parse.__name__ = f"comma-separated {element.__name__}"
    return parse


def _check_type(value: Any, hint: Any, where: str) -> None:
    """Refuse a JSON value that the field's type does not allow."""
    for kind in _alternatives(hint):
        origin = typing.get_origin(kind)
        if kind is type(None):
            fits = value is None
        elif origin is Literal:
            fits = value in typing.get_args(kind)
        elif origin is tuple:
            fits = isinstance(value, (list, tuple))
        elif origin in (dict, Mapping):
            fits = isinstance(value, dict)
        elif kind is float:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        elif kind is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, kind)
        if fits:
            return
    allowed = " or ".join(
        "null" if k is type(None) else str(getattr(k, "__name__", k)) for k in _alternatives(hint)
    )
    raise InputError(f"{where}: {value!r} is not {allowed}")
