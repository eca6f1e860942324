"""The int8 base: its error, its exact input gradient, and that everything runs on it."""

from __future__ import annotations

import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import tiny_transformer
from safetensors.torch import load_file, save_file
from torch import nn

from dmdtrain.config import ConfigError
from dmdtrain.models import quantize
from dmdtrain.models.quantize import KINDS, Int8Linear, dequantize, load_quantized, quantized_linear
from dmdtrain.models.roles import AdapterSpec, Roles
from dmdtrain.models.wan import find_folder, load_text_encoder, load_transformer


def int8(linear: nn.Linear) -> Int8Linear:
    return Int8Linear.from_weight(linear.weight.detach(), linear.bias)


def test_rows_have_their_own_scale():
    linear = nn.Linear(6, 3)
    with torch.no_grad():
        linear.weight *= torch.tensor([[1.0], [100.0], [0.01]])
    layer = Int8Linear.from_weight(linear.weight.detach(), linear.bias)
    assert layer.weight.dtype == torch.int8 and not layer.weight.requires_grad
    error = (dequantize(layer.weight, layer.scale, torch.float32) - linear.weight).abs()
    assert (
        error <= linear.weight.abs().amax(1, keepdim=True) / 127 * 0.57
    ).all()  # half a step, and float16 on the way


def test_input_gradient_is_that_of_the_dequantized_layer():
    layer = int8(nn.Linear(16, 24))
    plain = nn.Linear(16, 24)
    plain.weight.data, plain.bias.data = dequantize(layer.weight, layer.scale, torch.float32), layer.bias.data
    x = torch.randn(5, 7, 16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    upstream = torch.randn(5, 7, 24)
    layer(x).backward(upstream)
    plain(y).backward(upstream)
    assert torch.allclose(x.grad, y.grad, atol=1e-6)


def test_only_int8_is_saved_for_backward():
    layer = int8(nn.Linear(64, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True))
    assert sum(t.numel() * t.element_size() for t in saved) == 64 * 64 + 64 * 4


def test_an_llm_int8_layer_that_is_moved_takes_what_its_kernel_reads_along():
    layer = quantized_linear(torch.randn(32, 16), None, "int8-llm")
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    for used in (False, True):  # from the first pass on, the layer's state has them
        before = layer(x) if used else None
        layer._apply(torch.clone)  # as Module.to goes about it
        holder = layer.state if used else layer.weight
        assert holder.CB.data_ptr() == layer.weight.data_ptr() and holder.CB.dtype == torch.int8
        assert before is None or torch.equal(layer(x), before)


def stored(model: nn.Module, folder: Path) -> Path:
    """A model's weights in one file, float32."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def quantized_copy(model: nn.Module, kind: str, folder: Path) -> nn.Module:
    build = lambda: type(model).from_config(model.config)  # noqa: E731
    return load_quantized(build, [stored(model, folder)], kind, "blocks", torch.bfloat16, torch.device("cpu")).eval()


INPUTS = torch.randn(2, 4, 3, 8, 6), torch.tensor([900.0, 300.0]), torch.randn(2, 8, 16)
# Relative error of the whole model's output: of the kinds as they come, far below what a scrambled layer gives (about 1).
ERRORS = {"int8": 0.03, "int8-llm": 0.05, "nf4": 0.35}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_transformer_is_close_and_trains_adapters(kind, tmp_path):
    model = tiny_transformer()
    quantized = quantized_copy(model, kind, tmp_path)
    x, t, context = INPUTS
    half = (x.bfloat16(), t, context.bfloat16())
    with torch.no_grad():
        exact, close = model(*INPUTS, return_dict=False)[0], quantized(*half, return_dict=False)[0]
    assert 0 < (exact - close).norm() / exact.norm() < ERRORS[kind]
    spec = AdapterSpec(4, 8, ("to_q", "ffn.net.0.proj"))
    for checkpointing in (False, True):
        roles = Roles(
            quantized_copy(model, kind, tmp_path),
            trained={"student": spec, "fake_score": spec},
            init_lora_weights=False,
            gradient_checkpointing=checkpointing,
        )
        assert torch.equal(roles.flow("teacher", x, t, context), close)
        roles.flow("student", x, t, context).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in roles.parameters("student"))
        assert all(p.grad is None for p in roles.parameters("fake_score"))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_layer(kind, tmp_path):
    weight = torch.randn(512, 256)
    layer = quantized_linear(weight, None, kind)
    size = layer.weight.numel() * layer.weight.element_size() / weight.numel()
    assert size == (0.5 if kind == "nf4" else 1)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_loading_quantizes_blocks_alone(wan_folder, kind):
    folder = find_folder(str(wan_folder), "model.base")
    model = load_transformer(folder, kind)
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert all((k is not nn.Linear) == (name.startswith("blocks.") and kind != "bf16") for name, k in kinds.items())
    plain = load_transformer(folder, "bf16")
    others = [
        name
        for name, _ in plain.named_parameters()
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
    ]
    for name in others:  # what is not quantized is what a plain load gives, in value and type
        assert model.get_parameter(name).dtype == plain.get_parameter(name).dtype, name
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name)), name
    assert model.blocks[0].norm2.weight.dtype == model.scale_shift_table.dtype == torch.float32
    tokenizer, encoder = load_text_encoder(folder, kind)
    exact = load_text_encoder(folder, "fp32")[1]
    tokens = tokenizer(["a red cat"], return_tensors="pt").input_ids
    with torch.no_grad():
        wanted, found = exact(tokens).last_hidden_state, encoder(tokens).last_hidden_state.float()
    assert (wanted - found).norm() / wanted.norm() < 0.35


def test_reading_holds_one_full_precision_layer_at_a_time(tmp_path):
    """The point of quantizing while reading: bf16 weights of the whole model never exist."""
    model = tiny_transformer(num_layers=8, ffn_dim=256, num_attention_heads=4)
    live, peak = set(), []
    original = quantize.quantized_linear

    def watched(weight, bias, kind):
        live.add(weakref.ref(weight))
        peak.append(sum(reference() is not None for reference in live))
        return original(weight, bias, kind)

    quantize.quantized_linear = watched
    try:
        quantized_copy(model, "int8", tmp_path)
    finally:
        quantize.quantized_linear = original
    assert len(peak) == 8 * 10 and max(peak) <= 2  # the layer at hand, and the name that the loop has not rebound yet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.attn1.to_q.weight"), "lacks weights: blocks.1.attn1.to_q.weight"),
        (lambda w: w.pop("blocks.0.norm2.weight"), "lacks weights: blocks.0.norm2.weight"),
        (lambda w: w.update({"proj_out.weight": torch.zeros(3, 3)}), "proj_out.weight is [3, 3]"),
    ],
)
def test_broken_weights_are_named(wan_folder, tmp_path, change, message):
    copied = tmp_path / "wan"
    shutil.copytree(wan_folder, copied)
    file = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_transformer(find_folder(str(copied), "model.base"), "int8")
