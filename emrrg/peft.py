"""Parameter-efficient tuning of the vision Mamba beyond LoRA (MambaPEFT, arXiv 2411.03855).

    delta-A, delta-D,      A_log + d, D + d, conv weight + d, dt bias + d, with d = 0 at the start.
    delta-conv1d,          Weight decay then pulls towards the pre-trained value, not to zero
    delta-bias             (delta-bias is the paper's Bias-tuning)
    additional-scan        n further states a channel: rows for B and C on x_proj's input, and their
                           own A_log, copied from the first state; C's rows start at zero
    parallel-adapter       out + s U dropout(relu(V y)) beside out_proj, U = 0 at the start
    affix                  tokens of each layer and order, put after in_proj in front of the image's
                           and dropped after the scan. The paper's tokens are 2 D wide; their Z half
                           gates only what is dropped, so ours are D wide
    prompt                 tokens beside the image's, through all blocks, half of them visited
                           before the image and half after, dropped at the end
    affix-projected,       the same tokens, computed from small embeddings by a two-layer network
    prompt-projected       while training
    bias                   every bias of the encoder trains, as it is (BitFit)

All but the token methods and `bias` start as the exact identity of the base model; so does `bias`,
which changes nothing at first. Tokens start small. The deltas merge into the base exactly, and the
projected tokens into plain ones; the other methods have no place in the base's shapes.

Shapes: D width, N states, K = 4 orders, T tokens, n extra states, r adapter width, E hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from emrrg.config import PEFT_METHODS
from emrrg.errors import InputError
from emrrg.lora import DIRECTIONS, adaptable_layers
from emrrg.vision import CONV_WIDTH, Mixer, VisionMamba

# Weight decay of a method's parameters as a multiple of the run's (MambaPEFT's vision recipes);
# the extra states' A_log does not decay, as in Mamba itself.
DECAY = {
    "peft_delta_A": 10.0,
    "peft_delta_D": 10.0,
    "peft_delta_conv1d": 10.0,
    "peft_delta_bias": 100.0,
    "peft_scan.A_log": 0.0,
}


@dataclass(frozen=True)
class PeftSettings:
    """Sizes of the methods; the defaults are MambaPEFT's for Vim."""

    extra_states: int = 6
    """additional-scan: further states a channel."""
    affix_tokens: int = 3
    """affix: tokens of each layer and order."""
    prompt_tokens: int = 8
    """prompt: tokens beside the image's."""
    projection_dim: int | None = None
    """affix-projected, prompt-projected: hidden width of the network [default: the encoder's]."""
    adapter_dim: int = 32
    """parallel-adapter: its width."""
    adapter_scale: float = 0.1
    """parallel-adapter: its scale."""
    adapter_dropout: float = 0.1
    """parallel-adapter: dropout while training."""

    def __post_init__(self) -> None:
        for name in ("extra_states", "affix_tokens", "prompt_tokens", "adapter_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', ' ')}: {getattr(self, name)} is not above 0")
        if self.projection_dim is not None and self.projection_dim < 1:
            raise InputError(f"projection dim: {self.projection_dim} is not above 0")
        if not 0 <= self.adapter_dropout < 1:
            raise InputError(f"adapter dropout: {self.adapter_dropout} is not in [0, 1)")


class AdditionalScan(nn.Module):
    """n further states a channel, for each order."""

    def __init__(self, mixer: Mixer, states: int) -> None:
        super().__init__()
        first = torch.stack([getattr(mixer, f"A{k}_log").detach()[:, :1] for k in DIRECTIONS])
        self.A_log = nn.Parameter(first.float().repeat(1, 1, states))  # (K, D, n)
        bound = mixer.dim**-0.5
        rows = (len(DIRECTIONS), states, mixer.dim)
        self.B = nn.Parameter(torch.empty(rows, device=first.device).uniform_(-bound, bound))
        self.C = nn.Parameter(torch.zeros(rows, device=first.device))

    def forward(
        self, u: Tensor, A_log: Tensor, B: Tensor, C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append the further states.

        Args:
            u: (K, M, D), what x_proj sees.
            A_log: (K, D, N).
            B: (K, M, N).
            C: (K, M, N).
        Returns:
            A_log (K, D, N + n), B and C (K, M, N + n).
        """
        rows = torch.cat([self.B, self.C], dim=1).to(u.dtype)
        more_B, more_C = torch.bmm(u, rows.mT).chunk(2, dim=-1)
        return (
            torch.cat([A_log.float(), self.A_log], dim=-1),
            torch.cat([B, more_B.to(B.dtype)], dim=-1),
            torch.cat([C, more_C.to(C.dtype)], dim=-1),
        )


class ParallelAdapter(nn.Module):
    """s U dropout(relu(V y)), beside the output projection."""

    def __init__(self, dim: int, settings: PeftSettings, device: torch.device) -> None:
        super().__init__()
        self.scale, self.dropout = settings.adapter_scale, settings.adapter_dropout
        self.down = nn.Linear(dim, settings.adapter_dim, bias=False, device=device)
        self.up = nn.Linear(settings.adapter_dim, dim, bias=False, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, y: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        inner = F.dropout(F.relu(self.down(y)), self.dropout, self.training)
        return self.scale * self.up(inner)


class Tokens(nn.Module):
    """Learned tokens, plain or computed from embeddings by a two-layer network.

    Args:
        tokens: T.
        dim: D.
        groups: axes that number sets of T tokens; () for one set.
        hidden: E, width of the network; None: plain tokens.
        device: of the parameters.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        groups: tuple[int, ...],
        hidden: int | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.dim, self.groups = dim, groups
        if hidden is None:
            self.tokens = nn.Parameter(torch.empty(*groups, tokens, dim, device=device))
            nn.init.trunc_normal_(self.tokens, std=0.02)
            return
        count = math.prod(groups)
        self.embedding = nn.Parameter(torch.empty(tokens, dim, device=device))
        nn.init.trunc_normal_(self.embedding, std=0.02)
        self.inner = nn.Linear(dim, hidden, device=device)
        self.outer = nn.Linear(hidden, count * dim, device=device)
        for layer in (self.inner, self.outer):
            nn.init.zeros_(layer.bias)

    @property
    def projected(self) -> bool:
        """Whether a network computes the tokens."""
        return hasattr(self, "embedding")

    def forward(self) -> Tensor:
        """The tokens: (*groups, T, D)."""
        if not self.projected:
            return self.tokens
        out = self.outer(torch.tanh(self.inner(self.embedding)))  # (T, groups D)
        return out.view(len(out), *self.groups, self.dim).movedim(0, -2)

    @torch.no_grad()
    def collapse(self) -> None:
        """Keep the tokens and drop the network that computes them."""
        if self.projected:
            tokens = self().detach().clone(memory_format=torch.contiguous_format)
            trainable = self.embedding.requires_grad
            del self.embedding, self.inner, self.outer
            self.tokens = nn.Parameter(tokens, requires_grad=trainable)


def add_peft(
    model: nn.Module, methods: Sequence[str], settings: PeftSettings | None = None
) -> list[str]:
    """Add methods to the vision encoder in place; names of base parameters stay what they were.

    Args:
        model: a `VisionMamba`, or a system that holds one as `visual_encoder`.
        methods: of `PEFT_METHODS`, alone or together, and beside LoRA.
        settings: sizes; None: the defaults.
    Returns:
        Names of the parameters that the methods train, as `model.named_parameters()` has them: new
        ones, and for ``bias`` the encoder's own.
    Raises:
        InputError: an unknown or repeated method, two forms of one method, or no vision encoder.
    """
    settings = settings or PeftSettings()
    encoder = _encoder(model)
    training = encoder.training
    before = set(_trained_by_peft(model))
    for method in methods:
        if method not in PEFT_METHODS:
            raise InputError(f"PEFT method {method!r}: is not one of {', '.join(PEFT_METHODS)}")
        if method in active_methods(model):
            raise InputError(f"PEFT method {method!r}: is there already")
        _add(encoder, method, settings)
    encoder.train(training)  # what was added starts in training mode
    return [name for name in _trained_by_peft(model) if name not in before]


def _add(encoder: VisionMamba, method: str, settings: PeftSettings) -> None:
    device = encoder.pos_embed.device
    orders, states, dim = len(DIRECTIONS), encoder.state_dim, encoder.dim
    if method == "bias":
        encoder.peft_bias = True
        return
    kind, _, form = method.partition("-")
    if kind in ("affix", "prompt"):
        if getattr(encoder, f"peft_{kind}") is not None:
            raise InputError(f"PEFT method {method!r}: the other form of {kind} is there already")
        hidden = (settings.projection_dim or dim) if form else None
        groups = (encoder.depth, orders) if kind == "affix" else ()
        count = settings.affix_tokens if kind == "affix" else settings.prompt_tokens
        setattr(encoder, f"peft_{kind}", Tokens(count, dim, groups, hidden, device))
        return
    deltas = {
        "delta-A": (orders, dim, states),
        "delta-D": (orders, dim),
        "delta-conv1d": (orders, dim, CONV_WIDTH),
        "delta-bias": (orders, dim),
    }
    for mixer in _mixers(encoder):
        if method in deltas:
            delta = nn.Parameter(torch.zeros(deltas[method], device=device))
            setattr(mixer, f"peft_{method.replace('-', '_')}", delta)
        elif method == "additional-scan":
            mixer.peft_scan = AdditionalScan(mixer, settings.extra_states)
        else:
            mixer.peft_adapter = ParallelAdapter(dim, settings, device)


def active_methods(model: nn.Module) -> list[str]:
    """The methods that a model carries, in the order of `PEFT_METHODS`."""
    encoder = _encoder(model)
    mixer = next(iter(_mixers(encoder)))
    found = {"bias"} if encoder.peft_bias else set()
    for kind in ("affix", "prompt"):
        module = getattr(encoder, f"peft_{kind}")
        if module is not None:
            found.add(f"{kind}-projected" if module.projected else kind)
    for method in ("delta-A", "delta-D", "delta-conv1d", "delta-bias"):
        if getattr(mixer, f"peft_{method.replace('-', '_')}") is not None:
            found.add(method)
    if mixer.peft_scan is not None:
        found.add("additional-scan")
    if mixer.peft_adapter is not None:
        found.add("parallel-adapter")
    return [method for method in PEFT_METHODS if method in found]


def adapter_parameter_names(model: nn.Module) -> list[str]:
    """Everything that parameter-efficient tuning trains: LoRA's tensors and the methods' here.

    Args:
        model: a `VisionMamba`, a decoder, or a system of both.
    """
    lora = {
        f"{name}.{child}.{matrix}" if name else f"{child}.{matrix}"
        for name, layer in adaptable_layers(model)
        for child in layer.adapters()
        for matrix in "AB"
    }
    has_encoder = hasattr(getattr(model, "visual_encoder", model), "patch_embed")
    others = set(_trained_by_peft(model)) if has_encoder else set()
    return [name for name, _ in model.named_parameters() if name in lora or name in others]


def peft_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The methods' tensors alone, by their names in the model (LoRA's: `lora_state_dict`)."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in _trained_by_peft(model)}


def decay_multiplier(name: str) -> float:
    """What to multiply the run's weight decay by for a parameter: 1 for all but some methods'."""
    for ending, factor in DECAY.items():
        if name.endswith(ending):
            return factor
    return 1.0


@torch.no_grad()
def merge_peft(model: nn.Module, *, reversible: bool = True) -> list[str]:
    """Fold what can be folded: deltas into the base, projected tokens into plain tokens.

    In fp32 the merged model computes bit for bit what it computed before; a base in half precision
    rounds each sum once. The deltas leave the module tree, so that what remains of them is a plain
    model's parameters.

    Args:
        model: holds the methods.
        reversible: keep the deltas and the base as it was for `unmerge_peft`.
    Returns:
        The methods that stay, because the base has no place for them.
    """
    encoder = _encoder(model)
    for mixer in _mixers(encoder):
        for name, places in _delta_places(mixer).items():
            delta = getattr(mixer, name)
            if delta is None:
                continue
            if reversible:
                before = [place.detach().clone() for place in places]
                mixer.merged_deltas[name] = (delta, before)
            for place, change in zip(places, delta, strict=True):
                place.copy_(place.float() + change.view_as(place))
            setattr(mixer, name, None)
    for tokens in (encoder.peft_affix, encoder.peft_prompt):
        if tokens is not None:
            tokens.collapse()
    return [method for method in active_methods(model) if method != "bias"]


@torch.no_grad()
def unmerge_peft(model: nn.Module) -> None:
    """Undo `merge_peft`'s deltas: base bit for bit as before. Collapsed tokens stay plain."""
    for mixer in _mixers(_encoder(model)):
        places = _delta_places(mixer)
        for name, (delta, before) in mixer.merged_deltas.items():
            for place, value in zip(places[name], before, strict=True):
                place.copy_(value)
            setattr(mixer, name, delta)
        mixer.merged_deltas.clear()


def _delta_places(mixer: Mixer) -> dict[str, list[Tensor]]:
    """The base parameters of the four orders that each delta is added to."""
    return {
        "peft_delta_A": [getattr(mixer, f"A{k}_log") for k in DIRECTIONS],
        "peft_delta_D": [getattr(mixer, f"D{k}") for k in DIRECTIONS],
        "peft_delta_conv1d": [getattr(mixer, f"conv1d{k}").weight for k in DIRECTIONS],
        "peft_delta_bias": [getattr(mixer, f"dt_proj{k}").bias for k in DIRECTIONS],
    }


def _trained_by_peft(model: nn.Module) -> list[str]:
    """Names of what the methods train, in the order of the model's parameters."""
    encoder = _encoder(model)
    biases: set[int] = set()
    if encoder.peft_bias:
        biases = {id(p) for name, p in encoder.named_parameters() if name.endswith("bias")}
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in biases or any(part.startswith("peft_") for part in name.split("."))
    ]


def _mixers(encoder: VisionMamba) -> Iterator[Mixer]:
    for block in encoder.layers:
        yield cast(Any, block).mixer


def _encoder(model: nn.Module) -> VisionMamba:
    encoder = getattr(model, "visual_encoder", model)
    if not isinstance(encoder, VisionMamba):
        raise InputError("PEFT: the model has no vision Mamba")
    return encoder
