"""Scale-free clipping: the plain norm at the base, and the same norm at every other scale, unlike the plain one."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainingArguments

import moe_param
from moe_param import OptimizerError, Parameterization, ScaleFreeClipping, Shape, clip_grad_norm_, scale_config
from tests.models import build, classes, tiny_config, tokens
from tests.scaling.test_scales import BASE, FAMILIES

EXPERTS = ("expert_up", "expert_down")


def plain_norm(model: Any) -> float:
    return get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


def backward(model: Any, seed: int = 0) -> None:
    batch = tokens(128, 8, 32, seed)
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()


def at(family: str, axis: str = "width", factor: int = 1) -> tuple[Any, Parameterization]:
    config = tiny_config(family, **BASE, **FAMILIES[family])
    shape = Shape.from_config(config)
    model = build(family, scale_config(copy.deepcopy(config), **{axis: factor * getattr(shape, axis)}))
    return model, moe_param.apply(model, config, seed=0, experts=None)


@functools.cache
def norms(family: str, axis: str, factor: int) -> dict[str, torch.Tensor]:
    """(scale-free, plain) norm at initialization and after 4 steps: of the whole gradient, and of the experts'."""
    model, parameterization = at(family, axis, factor)
    optimizer = torch.optim.AdamW(parameterization.param_groups(model, lr=2**-8, eps=1e-12))
    rows: dict[str, list[list[float]]] = {"all": [], "experts": []}
    for step in range(5):
        backward(model, step)
        if step in (0, 4):
            kept = {name: p.grad for name, p in model.named_parameters()}
            rows["all"].append([clip_grad_norm_(parameterization, model, math.inf).item(), plain_norm(model)])
            for name, p in model.named_parameters():
                p.grad = p.grad if parameterization.rules[name].role in EXPERTS else None
            rows["experts"].append([clip_grad_norm_(parameterization, model, math.inf).item(), plain_norm(model)])
            for name, p in model.named_parameters():
                p.grad = kept[name]
        optimizer.step()
    return {part: torch.tensor(values) for part, values in rows.items()}


def moved(family: str, axis: str, factor: int, part: str) -> torch.Tensor:
    """Target / base of the two norms, whichever moment is further from 1."""
    ratios = norms(family, axis, factor)[part] / norms(family, "width", 1)[part]
    return ratios.gather(0, ratios.log().abs().argmax(0, keepdim=True))[0]


@pytest.mark.parametrize("axis", ["width", "depth", "num_experts", "expert_size"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_norm_stays_at_every_scale(family: str, axis: str) -> None:
    for part in ("all", "experts"):
        free, _ = moved(family, axis, 4, part)
        assert 1 / 1.5 < free < 1.5, part


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_plain_norm_does_not(family: str) -> None:
    free, plain = moved(family, "width", 16, "all")
    assert 1 / 1.25 < free < 1.25
    assert plain > 2
    # Along the other axes it is the experts' part that moves; in models this small it is little of the whole.
    assert moved(family, "num_experts", 4, "experts")[1] < 0.6
    assert moved(family, "depth", 4, "experts")[1] > 1.2
    assert moved(family, "expert_size", 4, "experts")[1] > 1.2


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_gradients_of_the_expected_scale_have_the_norm_of_the_base(family: str) -> None:
    """Closed form: where every gradient is its expected scale, what remains is the base's number of elements."""
    base = tiny_config(family)
    shape = Shape.from_config(base)
    sizes = {"width": 128, "depth": 2 * shape.depth, "num_experts": 24, "expert_size": 3 * shape.expert_size}
    models = []
    for config in (base, scale_config(base, **sizes)):
        with torch.device("meta"):
            models.append(classes(family)[0](config))
    elements = sum(p.numel() for p in models[0].parameters() if p.requires_grad)
    target = models[1].to_empty(device="cpu").double()  # sums of many equal float32 numbers lose digits
    plan = moe_param.plan(type(target), target.config, base)
    for name, p in target.named_parameters():
        p.grad = torch.full_like(p, plan.rules[name].eps)
    assert clip_grad_norm_(plan, target, math.inf).item() == pytest.approx(math.sqrt(elements), rel=1e-6)
    assert plain_norm(target) != pytest.approx(math.sqrt(elements), rel=0.1)


def test_at_the_base_it_is_torchs_own_clipping() -> None:
    (ours, parameterization), (theirs, _) = at("mixtral"), at("mixtral")
    backward(ours)
    backward(theirs)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    assert clip_grad_norm_(parameterization, ours, 0.1).item() == pytest.approx(expected.item(), rel=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


def test_the_direction_is_kept_and_small_gradients_are_left_alone() -> None:
    model, parameterization = at("mixtral", "width", 2)
    backward(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = clip_grad_norm_(parameterization.rules, model, 10.0)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    assert torch.equal(clip_grad_norm_(parameterization, model, norm.item() / 4), norm)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, before[name] / 4, rtol=1e-4, atol=0)
    assert clip_grad_norm_(parameterization, model, math.inf).item() == pytest.approx(norm.item() / 4, rel=1e-4)


def test_half_precision_wrappers_and_the_host() -> None:
    model, parameterization = at("mixtral", "width", 2)
    backward(model)
    norm = clip_grad_norm_(parameterization, model, math.inf)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(clip_grad_norm_(parameterization, compiled, math.inf), norm)
    model = model.to(torch.bfloat16)
    assert clip_grad_norm_(parameterization, model, math.inf).item() == pytest.approx(norm.item(), rel=0.01)
    model = model.to("meta")
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    assert clip_grad_norm_(parameterization, model, 1.0).is_meta  # reading a value would raise
    with pytest.raises(RuntimeError):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)


def test_bad_input() -> None:
    model, parameterization = at("mixtral")
    for threshold in (0.0, -1.0, math.nan):
        with pytest.raises(OptimizerError, match="max_norm must be > 0"):
            clip_grad_norm_(parameterization, model, threshold)
        with pytest.raises(OptimizerError, match="max_norm must be > 0"):
            ScaleFreeClipping(parameterization, threshold)
    with pytest.raises(OptimizerError, match="no parameter has a gradient"):
        clip_grad_norm_(parameterization, model, 1.0)
    backward(model)
    record = parameterization.to_dict()
    read_back = Parameterization.from_dict(record)
    assert torch.equal(clip_grad_norm_(read_back, model, 9.0), clip_grad_norm_(parameterization, model, 9.0))
    for rule in record["rules"]:
        del rule["share"]
    with pytest.raises(OptimizerError, match=r"written by an older moe_param.*reinit=False"):
        clip_grad_norm_(Parameterization.from_dict(record), model, 1.0)
    with pytest.raises(OptimizerError, match="the model is not the one that was parameterized"):
        clip_grad_norm_(parameterization, model.model, 1.0)


# -- the Trainer -----------------------------------------------------------------------------------------------------
class Seen(TrainerCallback):
    """The norm that the optimizer gets to see."""

    def __init__(self, parameterization: Parameterization) -> None:
        self.parameterization, self.norms = parameterization, list[float]()

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.norms.append(clip_grad_norm_(self.parameterization, model, math.inf).item())


def train(folder: Path, threshold: float, **changes: Any) -> tuple[Trainer, list[float]]:
    model, parameterization = at("mixtral", "width", 2)
    seen = Seen(parameterization)
    settings: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens(batch=16)],
        callbacks=[ScaleFreeClipping(parameterization, threshold), seen],
        optimizer_cls_and_kwargs=(parameterization.optimizer_factory(torch.optim.AdamW), {"lr": 1e-3}),
    )
    trainer.train()
    return trainer, seen.norms


def test_trainer_clips_and_logs(tmp_path: Path) -> None:
    free, norms = train(tmp_path, math.inf)
    logged = [entry["scale_free_grad_norm"] for entry in free.state.log_history if "loss" in entry]
    assert logged == norms
    threshold = min(norms) / 2
    clipped, after = train(tmp_path, threshold)
    assert after == pytest.approx([threshold] * 3, rel=1e-4)
    before = [entry["scale_free_grad_norm"] for entry in clipped.state.log_history if "loss" in entry]
    assert before[0] == norms[0]
    assert before[-1] != norms[-1]  # it did train differently
    plain = [entry["grad_norm"] for entry in clipped.state.log_history if "loss" in entry]
    assert plain[0] != pytest.approx(before[0], rel=0.05)


@pytest.mark.parametrize(
    "changes, message", [({"max_grad_norm": 1.0}, "Trainer at max_grad_norm 1.0"), ({"fp16": True}, "use bf16")]
)
def test_trainer_settings_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, parameterization = at("mixtral")
    arguments = TrainingArguments(output_dir=str(tmp_path), **{"max_grad_norm": 0.0, **changes})
    with pytest.raises(OptimizerError, match=message):
        ScaleFreeClipping(parameterization, 1.0).on_train_begin(arguments, None, None)  # type: ignore[arg-type]


def main() -> None:
    """The table of docs/optimizer.md."""
    print(
        f"{'':30}{'whole gradient':>24}{'experts':>24}\n{'target / base':30}" + 2 * f"{'scale-free':>14}{'plain':>10}"
    )
    for family in ("mixtral", "deepseek_v3", "qwen3_moe", "gpt_oss"):
        for axis, factor in (("width", 4), ("width", 16), ("depth", 4), ("num_experts", 4), ("expert_size", 4)):
            numbers = [moved(family, axis, factor, part) for part in ("all", "experts")]
            row = "".join(f"{free:>14.2f}{plain:>10.2f}" for free, plain in numbers)
            print(f"{f'{family} {axis} ×{factor}':30}{row}")


if __name__ == "__main__":
    main()
