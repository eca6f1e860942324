"""The int8 base: its error, its exact input gradient, and that everything runs on it."""

from __future__ import annotations

import copy

import torch
from conftest import tiny_transformer
from torch import nn

from dmdtrain.models.quantize import Int8Linear, dequantize, quantize_linears
from dmdtrain.models.roles import AdapterSpec, Roles
from dmdtrain.models.wan import find_folder, load_text_encoder, load_transformer


def test_rows_have_their_own_scale():
    linear = nn.Linear(6, 3)
    with torch.no_grad():
        linear.weight *= torch.tensor([[1.0], [100.0], [0.01]])
    layer = Int8Linear.from_linear(linear)
    assert layer.weight.dtype == torch.int8 and not layer.weight.requires_grad
    error = (dequantize(layer.weight, layer.scale, torch.float32) - linear.weight).abs()
    assert (error <= linear.weight.abs().amax(1, keepdim=True) / 127 * 0.51).all()


def test_input_gradient_is_that_of_the_dequantized_layer():
    layer = Int8Linear.from_linear(nn.Linear(16, 24))
    plain = nn.Linear(16, 24)
    plain.weight.data, plain.bias.data = dequantize(layer.weight, layer.scale, torch.float32), layer.bias.data
    x = torch.randn(5, 7, 16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    upstream = torch.randn(5, 7, 24)
    layer(x).backward(upstream)
    plain(y).backward(upstream)
    assert torch.allclose(x.grad, y.grad, atol=1e-6)


def test_only_int8_is_saved_for_backward():
    layer = Int8Linear.from_linear(nn.Linear(64, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True))
    assert sum(t.numel() * t.element_size() for t in saved) == 64 * 64 + 64 * 4


def test_a_quantized_transformer_is_close_and_trains_adapters():
    model = tiny_transformer()
    quantized = copy.deepcopy(model)
    quantize_linears(quantized.blocks)
    x, t, context = torch.randn(2, 4, 3, 8, 6), torch.tensor([900.0, 300.0]), torch.randn(2, 8, 16)
    with torch.no_grad():
        exact, close = (m(x, t, context, return_dict=False)[0] for m in (model, quantized))
    assert 0 < (exact - close).norm() / exact.norm() < 0.03
    spec = AdapterSpec(4, 8, ("to_q", "ffn.net.0.proj"))
    roles = Roles(quantized, trained={"student": spec, "fake_score": spec}, init_lora_weights=False)
    assert torch.equal(roles.flow("teacher", x, t, context), close)
    roles.flow("student", x, t, context).square().mean().backward()
    assert all(p.grad is not None for p in roles.parameters("student"))
    assert all(p.grad is None for p in roles.parameters("fake_score"))


def test_loading_quantizes_blocks_alone(wan_folder):
    folder = find_folder(str(wan_folder), "model.base")
    model = load_transformer(folder, "int8")
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert all((kind is Int8Linear) == name.startswith("blocks.") for name, kind in kinds.items())
    assert model.blocks[0].norm2.weight.dtype == torch.float32
    tokenizer, encoder = load_text_encoder(folder, "int8")
    tokens = tokenizer(["a red cat"], return_tensors="pt")
    assert encoder(tokens.input_ids).last_hidden_state.isfinite().all()
    assert any(isinstance(m, Int8Linear) for m in encoder.modules())
