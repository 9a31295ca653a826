"""Muon by role: torch's own on a plain matrix, a loop over the matrices of a stack, multipliers that are not folded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz  # type: ignore[attr-defined]
from transformers import Trainer, TrainingArguments

import moe_param
from moe_param import OptimizerError
from moe_param.optim import muon
from moe_param.optim.muon import Muon, orthogonalized, working_dtype
from moe_param.structure.dispatch import is_experts
from moe_param.structure.matrices import Matrices, arrangement
from moe_param.tuned import TunedNumbers
from tests.models import INTERFACE, build, classes, families, tiny_config, tokens
from tests.scaling.test_exactness import (
    BASE,
    CASES,
    DECAY,
    EPS,
    LR,
    TARGET,
    check_weights,
    explicit_twin,
    losses_of,
    setup,
)

MATRIX_LR = 0.02
PLAIN = {"copies": 1, "transposed": False, "parts": [], "interleaved": False, "scales": [1.0]}


# -- the update ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_plain_matrix_is_trained_as_by_torch(
    shape: tuple[int, int], nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "working_dtype", lambda _: torch.bfloat16)  # torch's on every device
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    layout = [{**PLAIN, "scales": [scale]}]
    mine = Muon([{"params": [ours], "matrices": layout}], lr=0.02, weight_decay=0.1, nesterov=nesterov)
    torch_s = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, nesterov=nesterov)
    for _ in range(10):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimizer in ((ours, mine), (theirs, torch_s)):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_stack_is_a_loop_over_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = {torch.float32: torch.bfloat16, torch.float64: torch.float64}
    monkeypatch.setattr(muon, "working_dtype", lambda found: computed[found.dtype])
    stack = torch.randn(7, 24, 40, generator=torch.Generator().manual_seed(1))
    one_by_one = [_zeropower_via_newtonschulz(each, (3.4445, -4.7750, 2.0315), 5, 1e-7) for each in stack]
    torch.testing.assert_close(orthogonalized(stack), torch.stack(one_by_one), rtol=0, atol=2**-6)  # bfloat16
    whole = orthogonalized(stack.double().reshape(1, 7 * 24, 40)).reshape(7, 24, 40)
    assert (whole - orthogonalized(stack.double())).abs().max() > 0.1  # the control: one for the whole stack


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, torch.Tensor]:
        model, p = small()
        optimizer = p.optimizer(model, optimizer="muon", lr=LR, matrix_lr_ratio=MATRIX_LR / LR)
        for i in range(2):
            batch = tokens(64, batch=2, length=12, seed=i)
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    at_once = trained()
    monkeypatch.setattr(muon, "AT_ONCE", 1)  # every parameter by itself
    one_by_one = trained()
    for name, value in at_once.items():
        torch.testing.assert_close(one_by_one[name], value, rtol=1e-4, atol=1e-5)


def test_singular_values_come_near_one() -> None:
    found = orthogonalized(torch.randn(3, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3


def test_what_the_iteration_is_computed_in() -> None:
    plain = torch.ones(1, 2, 2)
    assert working_dtype(plain) == torch.float32 and working_dtype(plain.bfloat16()) == torch.float32
    assert working_dtype(plain.double()) == torch.float64
    assert working_dtype(plain.to("meta")) == torch.bfloat16  # as any device that is no CPU


# -- which matrices a tensor holds -----------------------------------------------------------------------------------
def test_where_the_matrices_of_every_layout_lie() -> None:
    tensor = torch.arange(2 * 6 * 4).reshape(2, 6, 4)
    [whole] = Matrices(2).views(tensor)
    assert torch.equal(whole, tensor)
    gate, up = Matrices(2, parts=(3, 3)).views(tensor)
    assert torch.equal(gate, tensor[:, :3]) and torch.equal(up, tensor[:, 3:])
    gate, up = Matrices(2, transposed=True, parts=(2, 2), interleaved=True).views(tensor)
    assert torch.equal(gate, tensor[:, :, ::2].mT) and torch.equal(up, tensor[:, :, 1::2].mT)
    flat = tensor.reshape(12, 4)
    assert torch.equal(Matrices(2).views(flat)[0][1], flat[6:])
    q, k, v = Matrices(parts=(2, 3, 1)).views(flat[:6])
    assert torch.equal(q[0], flat[:2]) and torch.equal(k[0], flat[2:5]) and torch.equal(v[0], flat[5:6])


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        ([(0, 4, 1), (4, 8, 1)], ((4, 4), False)),
        ([(4, 8, 1), (0, 4, 1)], ((4, 4), False)),
        ([(0, 5, 1), (5, 6, 1), (6, 8, 1)], ((5, 1, 2), False)),
        ([(0, 8, 2), (1, 8, 2)], ((4, 4), True)),
        ([(0, 4, 1)], None),  # half of it
        ([(0, 5, 1), (4, 8, 1)], None),  # twice
        ([(0, 8, 2)], None),
        ([], None),
    ],
)
def test_pieces_are_parts_where_they_cover_all(pieces: Any, found: Any) -> None:
    assert arrangement(pieces, 8) == found


LAYOUTS: dict[str, tuple[str, Matrices]] = {  # read off transformers' modeling files
    "mixtral": ("experts.gate_up_proj", Matrices(8, False, (96, 96), False)),
    "gpt_oss": ("experts.gate_up_proj", Matrices(8, True, (96, 96), True)),
    "aria": ("experts.gate_up_proj", Matrices(8, True, (96, 96), False)),
    "llama4": ("experts.down_proj", Matrices(8, True, (), False)),
    "dbrx": ("attn.Wqkv.weight", Matrices(1, False, (72, 36, 36), False)),
    "granitemoeshared": ("shared_mlp.input_linear.weight", Matrices(1, False, (40, 40), False)),
    "ernie4_5_vl_moe": ("vision_moe.experts.gate_up_proj", Matrices(8, False, (36, 36), False)),  # never run on text
    "nemotron_h": ("experts.up_proj", Matrices(8, False, (), False)),  # no gate
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_layouts_are_seen_in_the_forward_pass(family: str) -> None:
    end, expected = LAYOUTS[family]
    config = tiny_config(family)
    model_class = type(build(family))
    rules = moe_param.plan(model_class, config, config).rules
    assert {rule.matrices for name, rule in rules.items() if name.endswith(end)} == {expected}


@pytest.mark.parametrize("family", families(INTERFACE))
def test_experts_lie_as_transformers_marks_them(family: str) -> None:
    """What the traced forward pass shows of them, against what the experts interface says of every family's module."""
    model = build(family)
    modules = dict(model.named_modules())
    rules = moe_param.plan(classes(family)[0], model.config, model.config).rules
    seen = 0
    for name, rule in rules.items():
        experts: Any = modules[name.rpartition(".")[0]]
        if rule.role not in ("expert_up", "expert_down") or not is_experts(experts) or len(rule.shape) != 3:
            continue
        fused = rule.role == "expert_up" and experts.has_gate
        half = (rule.shape[-1] if experts.is_transposed else rule.shape[-2]) // 2
        parts, interleaved = ((half, half), not experts.is_concatenated) if fused else ((), False)
        assert rule.matrices == Matrices(rule.shape[0], experts.is_transposed, parts, interleaved), name
        seen += 1
    assert seen


# -- folds -----------------------------------------------------------------------------------------------------------
def slices(name: str, tensor: torch.Tensor, interleaved: bool) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Each matrix of a parameter as (fan_out, fan_in), by name and by hand."""
    if not re.search(r"experts\.(gate_up|down)_proj$", name):
        return [lambda t: t]
    found: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for e in range(tensor.shape[0]):
        if name.endswith("down_proj"):
            found.append((lambda t, e=e: t[e].T) if interleaved else (lambda t, e=e: t[e]))  # type: ignore[misc]
        elif interleaved:
            found += [lambda t, e=e, i=i: t[e][:, i::2].T for i in (0, 1)]  # type: ignore[misc]
        else:
            found += [lambda t, e=e, i=i: t[e].chunk(2)[i] for i in (0, 1)]  # type: ignore[misc]
    return found


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Keller Jordan's iteration, one matrix at a time."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def is_matrix(name: str) -> bool:
    return bool(re.search(r"_proj(\.weight)?$", name)) or ("_a_proj" in name and name.endswith("weight"))


def reference(twin: Any, groups: list[dict[str, Any]], base: Any, table: dict[str, Any], interleaved: bool) -> Any:
    """Trains the twin: torch's AdamW for what is no matrix, this for what is one. Yields after every step."""
    bare = {re.sub(r"layers\.\d+\.", "", name): p for name, p in base.named_parameters()}
    named = list(twin.named_parameters())
    adam = [group for (name, _), group in zip(named, groups, strict=True) if not is_matrix(name)]
    optimizer = torch.optim.AdamW(adam, betas=(0.9, 0.95))
    momenta = {name: torch.zeros_like(p) for name, p in named if is_matrix(name)}

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            for name, p in named:
                if not is_matrix(name) or p.grad is None:
                    continue
                momenta[name].lerp_(p.grad, 0.05)
                update = p.grad.lerp(momenta[name], 0.95)
                first = bare[re.sub(r"layers\.\d+\.", "", name)]
                decay = 1 - MATRIX_LR * DECAY
                for cut, small in zip(
                    slices(name, p, interleaved), slices(name, first, interleaved) * 10, strict=False
                ):
                    (out, size), (out0, size0) = cut(p).shape, small(first).shape
                    rate = MATRIX_LR * max(1, out0 / size0) ** 0.5 * (out / out0 * size0 / size) ** 0.5
                    cut(p).mul_(decay).sub_(rate * newton_schulz(cut(update)))

    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", families(["mixtral", "qwen3_moe", "olmoe", "deepseek_v3_unnormalized", "gpt_oss"], ("mixtral", "gpt_oss"))
)
def test_folded_training_equals_explicit_multipliers(case: str) -> None:
    folded, base, parameterization, r, normalized = setup(case)
    twin, groups, table = explicit_twin(case, folded, base, r, normalized)
    optimizer = parameterization.optimizer(
        folded, optimizer="muon", lr=LR, eps=EPS, weight_decay=DECAY, matrix_lr_ratio=MATRIX_LR / LR
    )
    step = reference(twin, groups, base, table, interleaved=case == "gpt_oss")
    ours = losses_of(folded, optimizer.step)
    theirs = losses_of(twin, step)
    assert ours[0] - ours[-1] > 0.05, "the run must go somewhere for the comparison to mean anything"
    assert ours == pytest.approx(theirs, rel=1e-9)
    check_weights(folded, twin, table, 1e-8)


@pytest.mark.slow
def test_without_the_fold_in_the_rate_it_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an orthogonalized update does not see the multiplier, so the rate has to carry it."""
    folded, base, parameterization, r, normalized = setup("mixtral")
    twin, groups, table = explicit_twin("mixtral", folded, base, r, normalized)
    optimizer = parameterization.optimizer(
        folded, optimizer="muon", lr=LR, eps=EPS, weight_decay=DECAY, matrix_lr_ratio=MATRIX_LR / LR
    )
    for group in optimizer.param_groups:
        if group["matrices"] is not None and any(name.endswith("o_proj.weight") for name in group["names"]):
            group["lr"] *= r.l  # 1/L of the branch, left out
    ours = losses_of(folded, optimizer.step)
    theirs = losses_of(twin, reference(twin, groups, base, table, False))
    assert ours != pytest.approx(theirs, rel=1e-6)


# -- what one asks for -----------------------------------------------------------------------------------------------
def small() -> tuple[Any, Any]:
    family, base_sizes, target_sizes, _, _ = CASES["mixtral"]
    model = build(family, tiny_config(family, **{**TARGET, **target_sizes}))
    return model, moe_param.apply(model, tiny_config(family, **{**BASE, **base_sizes}), seed=1, experts=None)


def test_groups_say_who_trains_what() -> None:
    model, p = small()
    optimizer = p.optimizer(model, optimizer="muon", lr=0.01, matrix_lr_ratio=10, weight_decay=0.2)
    ours = {name for group in optimizer.param_groups if group["matrices"] is not None for name in group["names"]}
    assert ours == {name for name, _ in model.named_parameters() if is_matrix(name)}
    assert {name for group in optimizer.param_groups for name in group["names"]} == set(dict(model.named_parameters()))
    for group in optimizer.param_groups:  # the shrinkage of a step is the same everywhere
        if group["weight_decay"]:
            base = 0.1 if group["matrices"] is not None else 0.01
            assert group["lr"] * group["weight_decay"] == pytest.approx(base * 0.2)
    routed = p.optimizer(model, optimizer="muon", lr=0.01, adam_roles=())
    ours = {name for group in routed.param_groups if group["matrices"] is not None for name in group["names"]}
    assert any("gate.weight" in name for name in ours)


def test_a_saved_and_reloaded_optimizer_goes_on_to_the_bit(tmp_path: Any) -> None:
    def steps(model: Any, optimizer: Any, first: int, last: int) -> None:
        for i in range(first, last):
            batch = tokens(64, batch=2, length=12, seed=i)
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model, p = small()
    optimizer = p.optimizer(model, optimizer="muon", lr=LR, matrix_lr_ratio=MATRIX_LR / LR, weight_decay=DECAY)
    steps(model, optimizer, 0, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    steps(model, optimizer, 3, 6)
    again, q = small()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    second = q.optimizer(again, optimizer="muon", lr=LR, matrix_lr_ratio=MATRIX_LR / LR, weight_decay=DECAY)
    second.load_state_dict(saved["optimizer"])
    steps(again, second, 3, 6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_in_a_trainer_and_from_its_checkpoint(tmp_path: Path) -> None:
    """Six steps, and three with three more from the checkpoint: the same weights to the bit."""
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(64, batch=12, length=12)]

    def run(folder: Path, steps: int, resume: bool = False) -> Any:
        model, p = small()
        args = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=3, max_grad_norm=0.0, use_cpu=True,
            learning_rate=LR, lr_scheduler_type="constant", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        given = p.trainer_arguments(args, optimizer="muon", matrix_lr_ratio=MATRIX_LR / LR, weight_decay=DECAY)
        trainer = Trainer(model, args, train_dataset=data, **given)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        assert isinstance(trainer.optimizer.optimizer, Muon)
        return model

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    resumed = run(tmp_path / "parts", 6, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_file_that_was_tuned_with_muon_trains_with_muon(tmp_path: Path) -> None:
    model, p = small()
    numbers = TunedNumbers.read({"learning_rate": 0.01, "optimizer": "muon", "matrix_lr_ratio": 4})
    p = replace(p, tuned=numbers)
    optimizer = p.optimizer(model)
    assert isinstance(optimizer, Muon)
    queries = next(g for g in optimizer.param_groups if any("q_proj" in name for name in g["names"]))
    same = p.optimizer(model, optimizer="muon", lr=0.04, matrix_lr_ratio=1)
    assert queries["lr"] == next(g["lr"] for g in same.param_groups if queries["names"] == g["names"])
    with pytest.raises(OptimizerError, match="tuned with muon, and these are groups for Adam"):
        p.param_groups(model)
    with pytest.raises(moe_param.TunedError, match="optimizer 'moun' is not one of adamw, adam, muon"):
        TunedNumbers.read({"optimizer": "moun"})


def test_what_cannot_be_done_is_said() -> None:
    model, p = small()
    with pytest.raises(OptimizerError, match=r"torch\.optim\.Muon takes two-dimensional weights only"):
        p.optimizer(model, optimizer=torch.optim.Muon, lr=0.01)
    with pytest.raises(OptimizerError, match=r"matrix_lr_ratio is 10.0: only optimizer='muon'"):
        p.optimizer(model, lr=0.01, matrix_lr_ratio=10.0)
    with pytest.raises(OptimizerError, match="matrix_lr_ratio is -1"):
        p.optimizer(model, optimizer="muon", lr=0.01, matrix_lr_ratio=-1)
    with pytest.raises(OptimizerError, match=r"adam_roles: .*'rooter'.*'router'"):
        p.optimizer(model, optimizer="muon", lr=0.01, adam_roles=("rooter",))
    with pytest.raises(OptimizerError, match=r"adam_roles are \('expert_up',\): only optimizer='muon'"):
        p.optimizer(model, lr=0.01, adam_roles=("expert_up",))
    with pytest.raises(OptimizerError, match=r"matrix_lr_ratio is 4: only optimizer='muon'"):
        moe_param.coord_check(model.config, p.shape, axis="width", matrix_lr_ratio=4)
    with pytest.raises(OptimizerError, match="batch_ratio is 4: how Muon's rate"):
        p.optimizer(model, optimizer="muon", lr=0.01, batch_ratio=4.0)
    other = moe_param.plan(type(model), model.config, model.config, spec="mup")
    with pytest.raises(OptimizerError, match=r"q_proj.weight \(attention_in\) cannot .* spec mup has no rule for it"):
        other.optimizer(model, optimizer="muon", lr=0.01)
