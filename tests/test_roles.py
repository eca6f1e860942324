"""Roles on one shared base against separately built models. LoRA B is random everywhere: at zero all roles look alike."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable

import pytest
import torch
from conftest import tiny_transformer
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dmdtrain.models.roles import AdapterSpec, Role, Roles

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
SPECS = {"student": AdapterSpec(3, 6.0, TARGETS), "fake_score": AdapterSpec(2, 5.0, TARGETS)}
OTHER = {"student": "fake_score", "fake_score": "student"}
LAYERS = 2 * (2 * 4 + 2)  # blocks x (projections of two attentions + feed-forward)

# Different rows everywhere: 2 videos [C, T, H, W] = [4, 3, 4, 6], 7 text tokens.
_generator = torch.Generator().manual_seed(5)
LATENTS = torch.randn(2, 4, 3, 4, 6, generator=_generator)
TIMESTEP = torch.tensor([757.0, 261.0])
CONTEXT = torch.randn(2, 7, 16, generator=_generator)
PROBE = torch.randn(2, 4, 3, 4, 6, generator=_generator)


def make(*, seed: int = 0, trained: dict[str, AdapterSpec | None] | None = None, **options) -> Roles:
    torch.manual_seed(100)  # of the adapters
    base = options.pop("base", None) or tiny_transformer(seed)
    torch.manual_seed(101)
    return Roles(base, trained=SPECS if trained is None else trained, init_lora_weights=False, **options)


def flow(roles: Roles, name: str, scale: float = 1.0) -> torch.Tensor:
    return roles.flow(name, scale * LATENTS, TIMESTEP, CONTEXT)


def bare_flow(model: nn.Module, scale: float = 1.0) -> torch.Tensor:
    return model(scale * LATENTS, TIMESTEP, CONTEXT, return_dict=False)[0]


def reference(
    roles: Roles, name: str, spec: AdapterSpec | None = None, **changes
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The role as a model of its own, made by PEFT alone: (model, its trained parameters by the role's names)."""
    spec = SPECS[name] if spec is None else spec
    model = tiny_transformer(0, **changes).requires_grad_(False)
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets))
    inject_adapter_in_model(config, model)
    own = {key.replace(".default.", "."): p for key, p in model.named_parameters() if ".lora_" in key}
    with torch.no_grad():
        for key, value in roles.named_parameters(name).items():
            own[key].copy_(value)
    return model, own


def assert_same_gradients(
    got: dict[str, nn.Parameter], wanted: dict[str, nn.Parameter], tolerance: float = 1e-6
) -> None:
    """Every gradient is there, is not zero, and agrees in its norm's units."""
    assert got.keys() == wanted.keys()
    for key, parameter in wanted.items():
        assert parameter.grad is not None and parameter.grad.norm() > 1e-4, key
        assert got[key].grad is not None, key
        error = (got[key].grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < tolerance, (key, float(error))


def snapshot(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {key: p.detach().clone() for key, p in parameters.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def grads(roles: Roles, name: str) -> list[bool]:
    return [p.grad is not None for p in roles.parameters(name)]


# ---------------------------------------------------------------------------------------------------- forward


@torch.no_grad()
def test_three_roles_and_the_teacher_is_the_bare_base_to_the_bit():
    bare = bare_flow(tiny_transformer())
    roles = make()
    flows = {name: flow(roles, name) for name in ("teacher", "student", "fake_score")}
    assert torch.equal(flows["teacher"], bare)
    for a, b in (("teacher", "student"), ("teacher", "fake_score"), ("student", "fake_score")):
        assert (flows[a] - flows[b]).std() > 0.1 * bare.std(), (a, b)


@torch.no_grad()
def test_a_thousand_switches_change_nothing():
    roles = make()
    bare, before = tiny_transformer(), {name: flow(roles, name) for name in roles.roles}
    weights = snapshot(dict(roles.roles["teacher"].module.named_parameters()))
    flags = {key: p.requires_grad for key, p in roles.roles["teacher"].module.named_parameters()}
    order = random.Random(0)
    for i in range(1000):
        role = roles.roles[order.choice(list(roles.roles))]
        with roles.active(role.module, role.adapter):
            if i % 100 == 0:
                flow(roles, order.choice(list(roles.roles)))
    for name, wanted in before.items():
        assert torch.equal(flow(roles, name), wanted), name
    assert torch.equal(before["teacher"], bare_flow(bare))
    module = roles.roles["teacher"].module
    assert same(snapshot(dict(module.named_parameters())), weights)
    assert {key: p.requires_grad for key, p in module.named_parameters()} == flags


@torch.no_grad()
@pytest.mark.parametrize("name", SPECS)
def test_a_role_is_the_base_with_its_own_adapter(name):
    roles = make()
    torch.testing.assert_close(flow(roles, name), bare_flow(reference(roles, name)[0]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_active_nests_and_comes_back_after_an_exception():
    roles = make()
    module = roles.roles["student"].module
    student, fake_score, bare = flow(roles, "student"), flow(roles, "fake_score"), bare_flow(tiny_transformer())
    assert torch.equal(bare_flow(module), bare)  # outside every role: the base
    with roles.active(module, "student"):
        assert torch.equal(bare_flow(module), student)
        assert torch.equal(flow(roles, "teacher"), bare)
        assert torch.equal(flow(roles, "fake_score"), fake_score)
        assert torch.equal(bare_flow(module), student)
        with pytest.raises(ZeroDivisionError), roles.active(module, None):
            1 / (bare_flow(module) - bare).any().int().item()
        assert torch.equal(bare_flow(module), student)
        with pytest.raises(RuntimeError):
            roles.flow("fake_score", LATENTS[:, :3], TIMESTEP, CONTEXT)  # a channel short
        assert torch.equal(bare_flow(module), student)
    assert torch.equal(bare_flow(module), bare)


@torch.no_grad()
def test_alpha_over_rank_scales_the_adapter():
    def student(alpha: float, factor: float) -> torch.Tensor:
        roles = make(trained={"student": AdapterSpec(3, alpha, TARGETS)})
        for key, p in roles.named_parameters("student").items():
            if "lora_B" in key:
                p.mul_(factor)
        return flow(roles, "student")

    torch.testing.assert_close(student(6.0, 1.0), student(3.0, 2.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student(6.0, 1.0), student(1.0, 6.0), rtol=1e-5, atol=1e-5)
    assert (student(6.0, 1.0) - student(3.0, 1.0)).std() > 0.05
    # The same alpha at another rank: rows beyond the third are zero, so that only the divisor differs.
    wide, narrow = make(trained={"student": AdapterSpec(6, 6.0, TARGETS)}), make(trained={"student": SPECS["student"]})
    own = narrow.named_parameters("student")
    for key, p in wide.named_parameters("student").items():
        p.zero_()
        p.narrow(0 if "lora_A" in key else 1, 0, 3).copy_(own[key] if "lora_A" in key else 2 * own[key])
    torch.testing.assert_close(flow(wide, "student"), flow(narrow, "student"), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_fresh_adapter_is_the_base():
    roles = Roles(tiny_transformer(), trained=SPECS)
    for name in SPECS:
        assert torch.equal(flow(roles, name), bare_flow(tiny_transformer()))
        weights = roles.named_parameters(name)
        assert all(p.any() == ("lora_A" in key) for key, p in weights.items())


# ---------------------------------------------------------------------------------------------------- gradients


def in_thread(work: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


# What happens between a role's forward and its backward, and around the backward.
BETWEEN = ["nothing", "flows of all roles", "teacher active", "other active", "other thread", "other active, thread"]


def backward(roles: Roles, name: str, loss: torch.Tensor, between: str) -> None:
    module = roles.roles[name].module
    if between == "flows of all roles":
        with torch.no_grad():
            flow(roles, "teacher", 0.5)
        flow(roles, OTHER[name], 2.0)
        with torch.no_grad():
            flow(roles, name, 3.0)
        flow(roles, OTHER[name], 0.7)
    if between.startswith("other active"):
        with roles.active(module, OTHER[name]):
            in_thread(loss.backward) if "thread" in between else loss.backward()
            roles.flow("teacher", LATENTS, TIMESTEP, CONTEXT)
    elif between == "teacher active":
        with roles.active(module, None):
            loss.backward()
    elif between == "other thread":
        in_thread(loss.backward)
    else:
        loss.backward()


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_a_model_of_its_own(name, checkpointing, between):
    """The trap: with checkpointing a block runs again inside `backward`, when another role may be active."""
    roles = make(gradient_checkpointing=checkpointing)
    model, wanted = reference(roles, name)
    out = flow(roles, name)
    backward(roles, name, (out * PROBE).sum(), between)
    (bare_flow(model) * PROBE).sum().backward()
    assert_same_gradients(roles.named_parameters(name), wanted)
    assert not any(grads(roles, OTHER[name]))
    assert all(p.grad is None for key, p in roles.roles["teacher"].module.named_parameters() if ".lora_" not in key)
    # And the role that was switched to is still there after it.
    for other in roles.roles:
        separate = tiny_transformer() if other == "teacher" else reference(roles, other)[0]
        torch.testing.assert_close(flow(roles, other), bare_flow(separate), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_graphs_at_once(checkpointing):
    """Student and fake score in one loss, the fake score on the student's output: each gets its own gradient."""
    roles = make(gradient_checkpointing=checkpointing)
    (student, student_own), (critic, critic_own) = reference(roles, "student"), reference(roles, "fake_score")

    x = roles.flow("student", LATENTS, TIMESTEP, CONTEXT)
    (roles.flow("fake_score", x, TIMESTEP.flip(0), CONTEXT) * PROBE).sum().backward()
    x = student(LATENTS, TIMESTEP, CONTEXT, return_dict=False)[0]
    (critic(x, TIMESTEP.flip(0), CONTEXT, return_dict=False)[0] * PROBE).sum().backward()
    assert_same_gradients(roles.named_parameters("student"), student_own, 5e-6)
    assert_same_gradients(roles.named_parameters("fake_score"), critic_own, 5e-6)


def test_checkpointing_recomputes_and_changes_nothing():
    gradients, calls = [], []
    for checkpointing in (False, True):
        roles = make(gradient_checkpointing=checkpointing)
        out = flow(roles, "student")
        count = 0

        def counted(*_: object) -> None:
            nonlocal count
            count += 1

        handle = roles.roles["student"].module.blocks[1].attn1.register_forward_pre_hook(counted)
        out.square().sum().backward()
        handle.remove()
        gradients.append({key: p.grad for key, p in roles.named_parameters("student").items()})
        calls.append(count)
    assert calls == [0, 1]
    assert same(*gradients)


@pytest.mark.parametrize("name", SPECS)
def test_gradients_reach_the_latents_through_a_frozen_base(name):
    """The teacher has no trained weights, but a gradient goes through it."""
    roles = make(gradient_checkpointing=True)
    for role in ("teacher", name):
        latents = LATENTS.clone().requires_grad_()
        roles.flow(role, latents, TIMESTEP, CONTEXT).square().sum().backward()
        assert latents.grad is not None and latents.grad.norm() > 0.1
    assert not any(grads(roles, OTHER[name]))
    assert all(grads(roles, name))


# ---------------------------------------------------------------------------------------------------- training


def test_one_optimizer_step_moves_one_role():
    roles = make()
    module = roles.roles["teacher"].module
    before = {name: snapshot(roles.named_parameters(name)) for name in SPECS}
    base = {key: p.detach().clone() for key, p in module.named_parameters() if ".lora_" not in key}
    together = torch.optim.SGD([*roles.parameters("student"), *roles.parameters("fake_score")], lr=0.01)
    assert sum(len(group["params"]) for group in together.param_groups) == 2 * 2 * LAYERS
    assert all(p.requires_grad for group in together.param_groups for p in group["params"])

    for name in ("student", "fake_score", "student"):
        flow(roles, name).square().sum().backward()
        together.step()
        together.zero_grad()
        after = {key: snapshot(roles.named_parameters(key)) for key in SPECS}
        assert same(after[OTHER[name]], before[OTHER[name]])
        assert not any(torch.equal(after[name][key], before[name][key]) for key in after[name])
        before = after
    for key, p in module.named_parameters():
        if ".lora_" not in key:
            assert not p.requires_grad and p.grad is None and torch.equal(p, base[key]), key


def test_both_adapters_are_trainable_and_the_base_is_not():
    roles = make()
    trained = {id(p) for name in SPECS for p in roles.parameters(name)}
    assert len(trained) == 2 * 2 * LAYERS
    for key, p in roles.roles["teacher"].module.named_parameters():
        assert p.requires_grad == (id(p) in trained), key
    assert not any(module.training for module in roles.roles["teacher"].module.modules())


COMBINATIONS = [("lora", "lora"), ("full", "lora"), ("lora", "full"), ("full", "full")]


@pytest.mark.parametrize("other_teacher", [False, True])
@pytest.mark.parametrize(("student", "fake_score"), COMBINATIONS)
def test_every_combination_of_kinds(student, fake_score, other_teacher):
    kinds = {"student": student, "fake_score": fake_score}
    teacher = tiny_transformer(9, num_layers=3) if other_teacher else None
    roles = make(
        base=tiny_transformer().requires_grad_(False),  # as it is loaded
        trained={name: SPECS[name] if kind == "lora" else None for name, kind in kinds.items()},
        teacher=teacher,
        gradient_checkpointing=True,
    )
    wanted_teacher = bare_flow(tiny_transformer(9, num_layers=3) if other_teacher else tiny_transformer()).detach()
    assert torch.equal(flow(roles, "teacher"), wanted_teacher)
    references = {}
    for name, kind in kinds.items():
        if kind == "lora":
            references[name] = reference(roles, name)
        else:
            model = tiny_transformer()
            references[name] = (model, dict(model.named_parameters()))
            assert roles.named_parameters(name).keys() == references[name][1].keys()
        assert all(p.requires_grad for p in roles.parameters(name))
        torch.testing.assert_close(flow(roles, name), bare_flow(references[name][0]), rtol=1e-5, atol=1e-5)

    # Both graphs are open when the first backward runs.
    outs = {name: flow(roles, name) for name in kinds}
    for name in kinds:
        with torch.no_grad():
            flow(roles, "teacher")
        (outs[name] * PROBE).sum().backward()
        if name == "student":
            assert not any(grads(roles, "fake_score"))
        model, own = references[name]
        (bare_flow(model) * PROBE).sum().backward()
        got = roles.named_parameters(name)
        assert got.keys() == own.keys()
        for key in own:
            wanted = own[key].grad
            assert (got[key].grad - wanted).norm() <= 1e-5 * wanted.norm() + 1e-5, (name, key)

    # Trained weights move; what the teacher and the other role say does not.
    others = {name: flow(roles, name).detach() for name in ("teacher", "fake_score")}
    with torch.no_grad():
        for p in roles.parameters("student"):
            p.add_(0.1)
    assert torch.equal(flow(roles, "teacher"), wanted_teacher)
    assert torch.equal(flow(roles, "fake_score"), others["fake_score"])
    assert (flow(roles, "student") - bare_flow(references["student"][0])).std() > 0.1
    frozen = roles.roles["teacher"].module
    assert all(not p.requires_grad and p.grad is None for k, p in frozen.named_parameters() if ".lora_" not in k)
    assert roles.named_parameters("teacher") == {}


def test_full_weights_have_their_own_data_type():
    base = tiny_transformer().bfloat16()
    roles = make(base=base, trained={"student": None, "fake_score": SPECS["fake_score"]}, full_dtype=torch.float32)
    assert {p.dtype for p in roles.parameters("student")} == {torch.float32}
    assert {p.dtype for p in roles.parameters("fake_score")} == {torch.float32}
    assert base.patch_embedding.weight.dtype == torch.bfloat16
    assert flow(roles, "student").dtype == torch.float32
    assert flow(roles, "teacher").dtype == torch.bfloat16

    roles = make(trained={"student": None}, full_dtype=torch.bfloat16)
    kept = {key for key, p in roles.named_parameters("student").items() if p.dtype == torch.float32}
    for part in ("scale_shift_table", "blocks.1.scale_shift_table", "condition_embedder.time_embedder.linear_1.weight"):
        assert part in kept
    assert "blocks.1.norm2.weight" in kept
    assert "blocks.1.attn1.to_q.weight" not in kept
    wanted = bare_flow(tiny_transformer())
    assert 1e-4 < (flow(roles, "student").float() - wanted).std() / wanted.std() < 0.05


def test_adapter_data_type():
    low, high = make(adapter_dtype=torch.bfloat16), make()
    for name in SPECS:
        assert {p.dtype for p in low.parameters(name)} == {torch.bfloat16}
        assert all(p.requires_grad for p in low.parameters(name))
        assert all(
            torch.equal(p, high.named_parameters(name)[key].bfloat16()) for key, p in low.named_parameters(name).items()
        )
    out, wanted = flow(low, "student"), flow(high, "student")
    assert out.dtype == torch.float32
    assert 1e-5 < (out - wanted).std() / wanted.std() < 0.05
    assert torch.equal(flow(low, "teacher"), flow(high, "teacher"))
    out.square().sum().backward()
    assert {p.grad.dtype for p in low.parameters("student")} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------- names, weights


def test_names_do_not_depend_on_who_shares_the_module():
    wanted = make().named_parameters("student").keys()
    assert len(wanted) == 2 * LAYERS
    assert "blocks.1.ffn.net.0.proj.lora_A.weight" in wanted
    for trained in (
        {"student": SPECS["student"]},
        {"fake_score": SPECS["fake_score"], "student": SPECS["student"]},
        {"student": SPECS["student"], "fake_score": None},
    ):
        assert make(trained=trained).named_parameters("student").keys() == wanted
    teacher = tiny_transformer(9, num_layers=3)
    assert make(teacher=teacher).named_parameters("student").keys() == wanted
    assert make().named_parameters("fake_score").keys() == wanted
    assert not any("student" in key or "fake_score" in key for key in wanted)
    # A full role is called as the bare model is, with and without an adapter beside it.
    for trained in ({"student": None}, {"student": None, "fake_score": SPECS["fake_score"]}):
        names = make(trained=trained).named_parameters("student").keys()
        assert names == dict(tiny_transformer().named_parameters()).keys()


def test_two_roles_share_no_parameter():
    roles = make()
    ids = {name: {id(p) for p in roles.parameters(name)} for name in SPECS}
    assert not ids["student"] & ids["fake_score"]
    full = make(trained={"student": None, "fake_score": None})
    pointers = {name: {p.data_ptr() for p in full.parameters(name)} for name in SPECS}
    assert not pointers["student"] & pointers["fake_score"]
    base = {p.data_ptr() for p in full.roles["teacher"].module.parameters() if not p.requires_grad}
    assert len(base) == len(full.parameters("student"))  # all of it is frozen
    assert not base & (pointers["student"] | pointers["fake_score"])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_borrowed_weights_are_given_back_to_the_bit(kind):
    roles = make(trained={"student": SPECS["student"] if kind == "lora" else None, "fake_score": SPECS["fake_score"]})
    own = snapshot(roles.named_parameters("student"))
    values = {key: 1.3 * p for key, p in own.items()}
    with torch.no_grad():
        before, fake_score = flow(roles, "student"), flow(roles, "fake_score")
        identities = [id(p) for p in roles.parameters("student")]
        with roles.weights("student", values):
            assert same(snapshot(roles.named_parameters("student")), values)
            inside = flow(roles, "student")
            assert torch.equal(flow(roles, "fake_score"), fake_score)
        assert (inside - before).std() > 0.05
        assert torch.equal(flow(roles, "student"), before)
        assert [id(p) for p in roles.parameters("student")] == identities
        with roles.weights("student", None):
            assert torch.equal(flow(roles, "student"), before)
    assert same(snapshot(roles.named_parameters("student")), own)
    assert all(torch.equal(values[key], 1.3 * own[key]) for key in own)  # what was lent is untouched


def test_borrowed_weights_are_given_back_after_an_exception():
    roles = make()
    own = snapshot(roles.named_parameters("student"))
    values = {key: torch.full_like(p, torch.nan) for key, p in own.items()}
    with pytest.raises(ZeroDivisionError), roles.weights("student", values):
        raise ZeroDivisionError
    assert same(snapshot(roles.named_parameters("student")), own)
    # Also where the loading itself fails in the middle.
    last = list(values)[-1]
    for broken, error in (
        (values | {last: torch.zeros(5, 7, 9)}, RuntimeError),
        (values | {"nobody": torch.zeros(1)}, KeyError),
    ):
        with pytest.raises(error), roles.weights("student", broken):
            pass
        assert same(snapshot(roles.named_parameters("student")), own)


def test_borrowed_float32_weights_in_a_bf16_adapter():
    roles = make(adapter_dtype=torch.bfloat16)
    own = snapshot(roles.named_parameters("student"))
    values = {key: p.float() * 1.01 for key, p in own.items()}
    with roles.weights("student", values):
        inside = snapshot(roles.named_parameters("student"))
    assert all(torch.equal(inside[key], values[key].bfloat16()) for key in own)
    assert same(snapshot(roles.named_parameters("student")), own)


# ---------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("targets", [("to_nothing",), ("net.7",)])
def test_targets_that_match_no_linear_layer(targets):
    with pytest.raises(ValueError, match=targets[0]):
        Roles(tiny_transformer(), trained={"student": AdapterSpec(2, 2.0, targets)})


def test_targets_choose_the_layers():
    roles = make(trained={"student": AdapterSpec(2, 2.0, ("attn2.to_q", "ffn.net.2"))})
    layers = {key.rsplit(".lora_", 1)[0] for key in roles.named_parameters("student")}
    assert layers == {f"blocks.{i}.{end}" for i in range(2) for end in ("attn2.to_q", "ffn.net.2")}


def test_roles_with_different_targets():
    """A layer that only one of the roles adapts is the bare one for the other."""
    specs = {"student": AdapterSpec(3, 6.0, ("to_q", "ffn.net.2")), "fake_score": AdapterSpec(2, 5.0, ("to_v", "to_q"))}
    roles = make(trained=specs, gradient_checkpointing=True)
    for name, spec in specs.items():
        model, own = reference(roles, name, spec)
        out = flow(roles, name)
        with torch.no_grad():
            flow(roles, OTHER[name])
        torch.testing.assert_close(out, bare_flow(model), rtol=1e-5, atol=1e-5)
        (out * PROBE).sum().backward()
        (bare_flow(model) * PROBE).sum().backward()
        assert_same_gradients(roles.named_parameters(name), own)
    assert torch.equal(flow(roles, "teacher"), bare_flow(tiny_transformer()))


def test_the_given_base_is_the_shared_module():
    base = tiny_transformer()
    weights = copy.deepcopy(base.state_dict())
    roles = make(base=base)
    assert roles.roles == {
        "teacher": Role(base, None),
        "student": Role(base, "student"),
        "fake_score": Role(base, "fake_score"),
    }
    now = {key.replace(".base_layer.", "."): p for key, p in base.state_dict().items() if ".lora_" not in key}
    assert same(now, weights)


pytestmark = pytest.mark.usefixtures("one_thread")
