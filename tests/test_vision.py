"""The encoder against a slow float64 re-derivation, its sizes, and what it keeps in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from emrrg.errors import InputError
from emrrg.lora import LORA_TARGETS, add_lora
from emrrg.vision import VISION_PRESETS, Mixer, VisionMamba, interpolate_pos_embed

State = dict[str, Tensor]


def small(**changes: object) -> VisionMamba:
    """A small encoder whose every parameter is away from its special starting value."""
    torch.manual_seed(0)
    arguments = {"image_size": (48, 64), "dim": 24, "depth": 2, "state_dim": 5, **changes}
    model = VisionMamba(**arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "dt_proj" not in name:
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.02)
            if "proj" in name:  # larger than at the start, so that B, C and dt matter
                parameter.mul_(0.3 if name.endswith("bias") else 3)
    return model.eval()


def slow_order(tokens: list[int], rows: int, columns: int, suffix: str) -> list[int]:
    """Token numbers in the order in which a direction visits them, by moving them about."""
    middle = rows * columns // 2
    cls = tokens[middle]
    patches = tokens[:middle] + tokens[middle + 1 :]
    grid = [patches[r * columns : (r + 1) * columns] for r in range(rows)]
    if "_c" in suffix:
        patches = [grid[r][c] for c in range(columns) for r in range(rows)]
    sequence = [*patches[:middle], cls, *patches[middle:]]
    return sequence[::-1] if suffix.endswith("_b") else sequence


def slow_mixer(s: State, x: Tensor, rows: int, columns: int) -> Tensor:
    """One image (L, D): every direction on a permuted copy, gated there, and put back."""
    length, dim = x.shape
    rank = s["dt_proj.weight"].shape[1]
    xz = x @ s["in_proj.weight"].T
    total = torch.zeros(length, dim, dtype=x.dtype)
    for k in ("", "_b", "_c", "_c_b"):
        visited = slow_order(list(range(length)), rows, columns, k)
        X, Z = xz[visited, :dim], xz[visited, dim:]
        padded = torch.cat([X.new_zeros(3, dim), X])
        A = -s[f"A{k}_log"].exp()
        h = torch.zeros_like(A)
        for t in range(length):
            window = padded[t : t + 4]  # (4, D), the last of them is this step
            mixed = (window * s[f"conv1d{k}.weight"][:, 0].T).sum(0) + s[f"conv1d{k}.bias"]
            u = mixed / (1 + (-mixed).exp())
            dt, B, C = (s[f"x_proj{k}.weight"] @ u).split([rank, A.shape[1], A.shape[1]])
            delta = (1 + (s[f"dt_proj{k}.weight"] @ dt + s[f"dt_proj{k}.bias"]).exp()).log()
            h = (delta[:, None] * A).exp() * h + (delta * u)[:, None] * B[None, :]
            y = (h @ C + s[f"D{k}"] * u) * F.silu(Z[t])
            total = total.index_add(0, torch.tensor(visited[t : t + 1]), y[None] / 4)
    return total @ s["out_proj.weight"].T


def slow_encoder(model: VisionMamba, s: State, image: Tensor) -> Tensor:
    """One image (3, H, W) to (P+1, D), from the state dict alone."""
    rows, columns = image.shape[1] // 16, image.shape[2] // 16
    tokens = []
    for r in range(rows):
        for c in range(columns):
            patch = image[:, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16]
            weight = s["patch_embed.proj.weight"]
            tokens.append((weight * patch).sum((1, 2, 3)) + s["patch_embed.proj.bias"])
    tokens.insert(len(tokens) // 2, s["cls_token"][0, 0])
    h = torch.stack(tokens) + s["pos_embed"][0]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    for i in range(len(model.layers)):
        at = f"layers.{i}."
        mixer = {n.removeprefix(f"{at}mixer."): v for n, v in s.items() if n.startswith(at)}
        h = h + slow_mixer(mixer, norm(h, f"{at}norm1"), rows, columns)
        x = norm(h, f"{at}norm2")
        gate = linear(x, f"{at}mlp.w1")
        hidden = gate * torch.sigmoid(gate) * linear(x, f"{at}mlp.w2")
        h = h + linear(hidden, f"{at}mlp.w3")
    return norm(h, "norm_f")


def doubles(model: nn.Module) -> State:
    """The parameters in float64, as leaves."""
    return {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}


@pytest.mark.parametrize("size", [(48, 64), (32, 32), (16, 16), (80, 32)])
def test_forward_and_every_gradient_match_the_slow_derivation(size: tuple[int, int]) -> None:
    model = small(image_size=size)
    images = torch.randn(2, 3, *size)
    probe = torch.randn(2, model.num_patches + 1, model.dim)
    out = model(images)
    (out * probe).sum().backward()
    state = doubles(model)
    expected = torch.stack([slow_encoder(model, state, image.double()) for image in images])
    (expected * probe).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        expected_grad = state[name].grad
        assert expected_grad is not None
        error = (parameter.grad.double() - expected_grad).abs().max().item()
        assert error <= 2e-4 * max(1e-3, expected_grad.abs().max().item()), (name, error)


@pytest.mark.parametrize(
    ("preset", "count", "keys"),
    [("base", 84_262_656, 486), ("large", 296_010_720, 966), ("huge", 661_145_088, 966)],
)
def test_sizes_are_the_released_ones(preset: str, count: int, keys: int) -> None:
    with torch.device("meta"):
        model = VisionMamba(**VISION_PRESETS[preset])
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(state) == keys
    dim = model.dim
    expected = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 197, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "layers.3.mixer.A_c_b_log": (dim, 16),
        "layers.3.mixer.D_c_b": (dim,),
        "layers.3.mixer.conv1d_c_b.weight": (dim, 1, 4),
        "layers.3.mixer.x_proj_c.weight": (dim // 16 + 32, dim),
        "layers.3.mixer.dt_proj_b.weight": (dim, dim // 16),
        "layers.3.mixer.in_proj.weight": (2 * dim, dim),
        "layers.3.mlp.w1.weight": (dim * 8 // 3, dim),
        "layers.3.norm2.bias": (dim,),
        "norm_f.weight": (dim,),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = VisionMamba(image_size=64, dim=64, depth=4)
    mixer = model.layers[1].mixer
    torch.testing.assert_close(mixer.A_c_log.exp(), torch.arange(1.0, 17).repeat(64, 1))
    dt = F.softplus(mixer.dt_proj_b.bias)
    assert 1e-3 * 0.999 <= dt.min() < 5e-3 and 0.05 < dt.max() <= 0.1 * 1.001
    assert mixer.dt_proj.weight.abs().max() <= 4**-0.5
    bound = 64**-0.5 / 2  # kaiming_uniform(a=sqrt 5) over sqrt(depth)
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert abs(model.patch_embed.proj.weight.std().item() * 768**0.5 - 1) < 0.02
    assert 0.015 < model.pos_embed.std() < 0.025
    assert [block.drop_path for block in model.layers] == pytest.approx([0, 0, 0.1 / 3, 0.2 / 3])


@pytest.mark.parametrize("size", [(40, 48), (0, 16), 8])
def test_an_image_size_off_the_grid_is_refused(size: int | tuple[int, int]) -> None:
    with pytest.raises(InputError, match="not a multiple of the patch size 16"):
        VisionMamba(image_size=size, dim=16, depth=1)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected \(batch, 3, 48, 64\)"):
        small()(torch.zeros(1, 3, 64, 48))


def test_pos_embed_is_interpolated_around_the_class_token() -> None:
    torch.manual_seed(0)
    old = torch.randn(1, 145, 6)
    new = interpolate_pos_embed(old, (14, 14))
    assert torch.equal(new[:, 98], old[:, 72])
    image = torch.cat([old[:, :72], old[:, 73:]], 1).reshape(1, 12, 12, 6).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(14, 14), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(torch.cat([new[:, :98], new[:, 99:]], 1), image)
    bare = interpolate_pos_embed(old[:, :144], (14, 14))
    assert bare.shape == (1, 197, 6) and bare[:, 98].abs().max() == 0
    assert torch.equal(interpolate_pos_embed(old, (12, 12)), old)
    with pytest.raises(InputError, match="no square grid"):
        interpolate_pos_embed(old[:, :143], (14, 14))


def test_resize_keeps_what_the_image_shows() -> None:
    model = small(image_size=64)
    before = model.pos_embed.detach().clone()
    model.resize((96, 64))
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 25, 24)
    torch.testing.assert_close(model.pos_embed[:, 12], before[:, 8])
    model.resize(64)
    assert model.pos_embed.requires_grad and model.orders.shape == (4, 17)


def test_checkpointing_gives_the_same_gradients_and_holds_less() -> None:
    images = torch.randn(2, 3, 48, 64)
    gradients, held = [], []
    for checkpointing in (False, True):
        model = small(depth=3, checkpointing=checkpointing).train()
        torch.manual_seed(1)  # the same paths are dropped
        out, saved = saved_bytes(model, lambda model=model: model(images))
        out.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        held.append(saved)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert held[1] < held[0] / 3


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `run` keeps for the backward pass, apart from parameters, in bytes."""
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    return out, sum(storages.values())


def test_a_mixer_keeps_only_what_the_trainable_gradients_need() -> None:
    torch.manual_seed(0)
    length, dim, states, rank, batch = 17, 64, 16, 4, 8
    model = VisionMamba(image_size=64, dim=dim, depth=1)
    mixer: Mixer = model.layers[0].mixer
    x = torch.randn(batch, length, dim, requires_grad=True)
    _, full = saved_bytes(model, lambda: mixer(x, model.orders))
    add_lora(model, ["X"], rank=rank, dropout=0.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    out, peft = saved_bytes(model, lambda: mixer(x, model.orders))
    out.sum().backward()
    assert mixer.in_proj.lora_X.A.grad is not None and mixer.in_proj.weight.grad is None
    # Trained whole, W_out keeps its input (B L D floats) and dt_proj its (4 B L R): not so here.
    tokens = 4 * batch * length
    assert full - peft >= tokens * dim
    small_weights = 4 * 4 * (3 * 16 * dim + 16 * dim * 3)  # stacked weights of the four orders
    needed = tokens * (dim + 2 * dim + rank + 4 * dim * 2 + 4 * 2 * states + 4 * (rank + 32))
    assert peft <= needed + small_weights + tokens * dim // 4


def test_the_first_block_keeps_nothing_where_nothing_before_trains() -> None:
    model = small(depth=2)
    images = torch.randn(2, 3, 48, 64)
    _, full = saved_bytes(model, lambda: model(images))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("layers.1."))
    _, half = saved_bytes(model, lambda: model(images))
    assert half < 0.55 * full
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert saved_bytes(model, lambda: model(images))[1] == 0


def test_bf16_autocast_is_finite_at_depth_24() -> None:
    torch.manual_seed(0)
    model = VisionMamba(image_size=96, dim=64, depth=24).train()
    images = torch.randn(2, 3, 96, 96)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    out.square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images).float()
    assert (rounded - exact).norm() / exact.norm() < 0.05


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    block = small(depth=3, drop_path=0.5).layers[2].train()
    h, branch = torch.zeros(4000, 1, 1), torch.ones(4000, 1, 1)
    torch.manual_seed(0)
    out = block._add(h, branch)
    rate = block.drop_path
    assert rate == pytest.approx(0.25)
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / (1 - rate)]))
    assert abs(out.mean().item() - 1) < 4 * math.sqrt(rate / (1 - rate) / 4000)


def test_compiles_without_graph_breaks() -> None:
    """With an adapter everywhere; then in training: dropped paths, checkpointing, autocast."""
    model = small(depth=1)
    names = add_lora(model, [t for t in LORA_TARGETS if t != "llm"], rank=3)
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).normal_(std=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(images)
    torch.testing.assert_close(compiled(images), expected)
    expected.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if n in names}
    model.zero_grad()
    compiled(images).sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
    model = small(depth=3, drop_path=0.5, checkpointing=True).train()
    add_lora(model, ["X"], rank=3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, fullgraph=True, backend="aot_eager")(images).sum().backward()
    assert model.layers[0].mixer.in_proj.lora_X.B.grad.isfinite().all()
