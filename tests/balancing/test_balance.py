"""The update against eq. 2 of arXiv:2601.20205, computed by hand from recorded indices."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import TrainerControl, TrainerState, TrainingArguments

from moe_param import BalanceError, LoadBalancer, LoadBalancingCallback, linear_decay
from moe_param.balancing.gates import Gate
from moe_param.balancing.saved import FILE
from moe_param.balancing.selection import CONFIG
from moe_param.training.data.packing import PackedDataset
from moe_param.training.data.text import ByteTokenizer, stdlib_tokens
from moe_param.training.pretrain import MoETrainer
from recipes.bench import balance as bench
from tests.models import build, tokens

RATE = 0.05
NATIVE, INJECTED = "deepseek_v3", "qwen3_moe"
BOTH = pytest.mark.parametrize("family", [NATIVE, INJECTED])


def balanced(family: str, **settings: Any) -> tuple[Any, LoadBalancer]:
    model = build(family)
    return model, LoadBalancer(model, inject=family == INJECTED, **{"rate": RATE, **settings})


class Recorder:
    """Indices of every router, forward pass by forward pass, read independently of the balancer."""

    def __init__(self, balancer: LoadBalancer) -> None:
        self.num_experts = balancer.bias.shape[-1]
        self.indices: list[list[torch.Tensor]] = [[] for _ in balancer.routes]
        for route, seen in zip(balancer.routes, self.indices):
            route.module.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[2].clone()))

    def loads(self, masks: list[torch.Tensor] | None = None, last: int = 0, dtype: Any = torch.float64) -> torch.Tensor:
        """Per layer and expert, the share of the recorded tokens that were routed to it. last: of so many passes."""
        rows = []
        for seen in self.indices:
            hits, count = torch.zeros(self.num_experts, dtype=dtype), 0
            for i, batch in list(enumerate(seen))[-last:]:
                keep = [True] * len(batch) if masks is None else masks[i].flatten().bool().tolist()
                for row, real in zip(batch.tolist(), keep):
                    count += real
                    for expert in row:
                        hits[expert] += int(real)
            rows.append(hits.double() / count)
        return torch.stack(rows)

    def clear(self) -> None:
        for seen in self.indices:
            seen.clear()


def by_hand(before: torch.Tensor, load: torch.Tensor, rule: str = "proportional") -> torch.Tensor:
    top_k = load.sum(-1, keepdim=True)
    excess = load - top_k / load.shape[-1]
    excess = torch.where(excess.abs() < 1e-9, 0.0, excess)
    return before.double() - RATE * (excess.sign() if rule == "sign" else excess)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=0, atol=1e-7)


def train(
    model: Any, first: int = 0, last: int = 3, micro: int = 1, masks: list[torch.Tensor] | None = None
) -> Iterator[None]:
    """Optimizer steps (without state, so that a run can go on from the weights); yields where the balancer steps."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(first, last):
        for i in range(micro):
            ids = tokens(seed=step * micro + i)
            model(input_ids=ids, labels=ids, attention_mask=None if masks is None else masks[i]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def trained(model: Any, balancer: LoadBalancer, **how: Any) -> torch.Tensor:
    for _ in train(model, **how):
        balancer.step()
    assert balancer.bias.any()
    return balancer.bias.clone()


# -- eq. 2 -----------------------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize("rule", ["proportional", "sign"])
@pytest.mark.parametrize("micro", [1, 4])
def test_the_update_is_equation_2(family: str, rule: Any, micro: int) -> None:
    model, balancer = balanced(family, rule=rule)
    recorder = Recorder(balancer)
    for _ in train(model, micro=micro):
        before, load = balancer.bias.clone(), recorder.loads()
        balancer.step()
        assert close(balancer.last_load, load)
        assert close(balancer.bias, by_hand(before, load, rule))
        for row, route in enumerate(balancer.routes):
            assert route.native is None or torch.equal(route.native.flatten(), balancer.bias[row])
        last = recorder.loads(last=1)
        if micro > 1 and rule == "proportional":  # control: an update by the last micro-batch alone is told apart
            assert not close(balancer.bias, by_hand(before, last))
        recorder.clear()


def test_an_update_per_micro_batch_would_be_seen() -> None:
    """Control: stepping inside the accumulation changes both the routing within the step and its sum."""
    ends = []
    for inside in (False, True):
        model, balancer = balanced(NATIVE)
        model.train()
        for seed in range(4):
            model(input_ids=tokens(seed=seed))
            if inside:
                balancer.step()
        if not inside:
            balancer.step()
        ends.append(balancer.bias)
    assert not close(*ends)


@BOTH
def test_padding_is_not_counted(family: str) -> None:
    masks = [torch.ones(4, 16, dtype=torch.long) for _ in range(2)]
    masks[0][0, 5:] = 0
    masks[1][2, :9] = 0
    model, balancer = balanced(family)
    recorder = Recorder(balancer)
    for _ in train(model, micro=2, masks=masks):
        before, load = balancer.bias.clone(), recorder.loads(masks)
        balancer.step()
        assert close(balancer.bias, by_hand(before, load))
        assert not close(balancer.bias, by_hand(before, recorder.loads())), "padding would show"
        recorder.clear()


@BOTH
@pytest.mark.parametrize("inner_is_training", [True, False])
def test_a_mask_belongs_to_one_forward_pass(family: str, inner_is_training: bool) -> None:
    """Not to the inner model called afterwards, be it that the pass before raised; an inner mask holds inside only."""
    model, balancer = balanced(family)
    model.train()
    half = torch.ones(2, 16, dtype=torch.long)
    half[:, 8:] = 0
    ids, layers, top_k = tokens(batch=2), len(balancer.routes), 2

    def counted(call: Any, **inputs: Any) -> float:
        before = balancer.counts.sum()
        call(input_ids=ids, **inputs)
        return float(balancer.counts.sum() - before) / layers / top_k

    assert counted(model, attention_mask=half) == 16
    model.model.train(inner_is_training)
    assert counted(model.model) == 32 * inner_is_training
    assert counted(model.model, attention_mask=half) == 16 * inner_is_training
    model.train()
    assert counted(model) == 32

    failure = KeyboardInterrupt if inner_is_training else RuntimeError

    def fail(*args: Any) -> None:
        raise failure

    for broken in (balancer.routes[-1].module, model.model.norm, model.lm_head):
        for register in (broken.register_forward_pre_hook, broken.register_forward_hook):
            handle = register(fail)
            with pytest.raises(failure):
                counted(model, attention_mask=half)
            handle.remove()
            if failure is KeyboardInterrupt:  # torch calls no hook after it: whoever goes on discards what was counted
                balancer.discard()
            assert counted(model.model) == 32


@BOTH
@pytest.mark.parametrize("reentrant", [True, False])
def test_padding_is_not_counted_where_layers_run_again_in_the_backward_pass(family: str, reentrant: bool) -> None:
    masks = [torch.ones(4, 16, dtype=torch.long)]
    masks[0][1, 3:] = 0
    model, balancer = balanced(family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    recorder = Recorder(balancer)
    for _ in train(model, masks=masks, last=1):
        assert len(recorder.indices[0]) == 2, "the router does run twice"
        balancer.step()
        assert close(balancer.last_load, recorder.loads(masks * 2))
        assert not close(balancer.last_load, recorder.loads()), "padding would show"


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    plain = trained(*balanced(family), micro=2)
    model, balancer = balanced(family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    recorder = Recorder(balancer)
    assert torch.equal(trained(model, balancer, micro=2), plain)
    assert len(recorder.indices[0]) == 3 * 2 * 2, "the router does run twice"
    assert balancer.last_load.sum() == 2 * len(balancer.routes)


@BOTH
def test_selective_checkpointing_changes_nothing(family: str) -> None:
    """What is kept and what is computed again differs between operations; the router's are among the latter."""
    plain = trained(*balanced(family), micro=2)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    model, balancer = balanced(family)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    recorder = Recorder(balancer)
    assert torch.equal(trained(model, balancer, micro=2), plain)
    assert len(recorder.indices[0]) == 3 * 2 * 2, "the router does run twice"


@BOTH
def test_torch_compile_changes_nothing(family: str) -> None:
    plain = trained(*balanced(family), micro=2)
    model, balancer = balanced(family)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in train(compiled, micro=2):
        balancer.step()
    assert close(balancer.bias, plain)


@BOTH
def test_bfloat16_models_are_counted_in_integers(family: str) -> None:
    model = build(family).bfloat16().train()
    balancer = LoadBalancer(model, rate=RATE, inject=family == INJECTED)
    recorder = Recorder(balancer)
    for seed in range(2):
        model(input_ids=tokens(batch=16, length=64, seed=seed))
    load = recorder.loads()
    balancer.step()
    assert balancer.bias.dtype == torch.float32
    assert close(balancer.bias, by_hand(torch.zeros_like(load), load))
    wrong = recorder.loads(dtype=torch.bfloat16)  # control: bfloat16 stops counting at 256
    assert not close(balancer.bias, by_hand(torch.zeros_like(load), wrong))


def test_small_steps_add_up_where_the_native_bias_is_bfloat16() -> None:
    model = build(NATIVE).bfloat16()
    for route in LoadBalancer(model, rate=0).routes:
        assert route.owner is not None
        setattr(route.owner, route.leaf, route.native.bfloat16())  # type: ignore[union-attr]
    balancer = LoadBalancer(model, rate=1e-3, rule="sign")
    for _ in range(1000):
        balancer.counts[:, 0] = 8
        balancer.step()
    assert balancer.bias[0, 0].item() == pytest.approx(-1.0, rel=1e-4)
    assert balancer.routes[0].native.flatten()[0].item() == -1.0  # type: ignore[union-attr]
    assert balancer.needs_file
    control = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(1000):
        control -= 1e-3
    assert control > -0.6


def test_only_training_is_counted() -> None:
    model, balancer = balanced(NATIVE)
    model.eval()(input_ids=tokens())
    assert not balancer.counts.any()
    balancer.step()
    assert not balancer.bias.any()
    model.train()(input_ids=tokens())
    assert balancer.counts.sum() == len(balancer.routes) * 64 * 2


def test_rates_and_recentring() -> None:
    _, balancer = balanced(NATIVE, rate=linear_decay(1.0, 4), rule="sign", recentre=True)
    moved = []
    for _ in range(5):
        before = balancer.bias.clone()
        balancer.counts[:, 0] = 3
        balancer.step()
        assert balancer.bias.mean(-1).abs().max() < 1e-6
        moved.append((before - balancer.bias)[0])
    spread = [float(m[0] - m[1]) for m in moved]
    assert spread == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0], abs=1e-6)


def test_metrics_by_hand() -> None:
    _, balancer = balanced(NATIVE)
    assert balancer.metrics() == {}
    balancer.counts.fill_(10)
    balancer.counts[1] = torch.tensor([40, 20, 10, 5, 3, 1, 1, 0])
    balancer.step()
    metrics = balancer.metrics()
    name = balancer.routes[1].name
    p = [x / 80 for x in (40, 20, 10, 5, 3, 1, 1) if x]
    assert metrics["max_over_mean"] == pytest.approx(4.0)
    assert metrics["starved"] == pytest.approx(1 / (8 * len(balancer.routes)))
    assert metrics[f"entropy/{name}"] == pytest.approx(-sum(x * math.log(x) for x in p) / math.log(8), rel=1e-5)
    assert metrics[f"entropy/{balancer.routes[0].name}"] == pytest.approx(1.0)
    assert metrics["bias_range"] == pytest.approx(RATE * 2 * 40 / 80, rel=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(BalanceError, match="rule is 'signs'"):
        balanced(NATIVE, rule="signs")
    with pytest.raises(BalanceError, match="rate is -1"):
        balanced(NATIVE, rate=-1)
    model = build(INJECTED, output_router_logits=True)
    with pytest.warns(UserWarning, match="auxiliary loss is on"):
        LoadBalancer(model, rate=RATE, inject=True)
    with pytest.raises(BalanceError, match="auxiliary loss is on"):
        LoadBalancer(model, rate=RATE, inject=True, strict=True)


def test_removing_gives_the_model_back() -> None:
    model, balancer = balanced(INJECTED)
    model.eval()
    before = model(input_ids=tokens()).logits
    balancer.bias[:, 0] = 5.0
    balancer.write()
    assert not torch.equal(model(input_ids=tokens()).logits, before)
    balancer.stop()
    assert not torch.equal(model(input_ids=tokens()).logits, before), "stopping leaves what the model computes"
    balancer.remove()
    assert not any("selection" in name for name in model.state_dict()) and not hasattr(model.config, CONFIG)
    assert torch.equal(model(input_ids=tokens()).logits, before)


class Waits(TorchDispatchMode):
    """Operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if boolean or name in ("_local_scalar_dense", "nonzero", "equal", "bincount", "masked_select", "unique"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@BOTH
@torch.no_grad()
def test_nothing_waits_for_the_device_but_metrics(family: str) -> None:
    model, balancer = balanced(family)
    router, gate = balancer.routes[0].module, torch.randn(64, 64)
    router.train()
    balancer._enter(model)(model.train(), (tokens(),), {"attention_mask": torch.ones(4, 16)})
    with Waits() as waits:
        router(gate)
        balancer.step()
        assert waits.seen == []
        assert float(balancer.bias[0, 0]) <= 1 and waits.seen, "the control: reading a number does wait"
    assert balancer.last_load[0].sum() == 2


# -- scale -----------------------------------------------------------------------------------------------------------
def best_rate(num_experts: int, kind: str, rates: list[float]) -> float:
    """The rate that brings routers with skewed logits to a max-over-mean load of 1.3 in the fewest steps."""
    top_k = num_experts // 4
    gate = Gate(kind, top_k) if kind != "probability" else None
    needed = {}
    for rate in rates:
        generator = torch.Generator().manual_seed(num_experts)
        skew, bias = torch.randn(num_experts, generator=generator), torch.zeros(num_experts)
        for step in range(40):
            logits = torch.randn(2048, num_experts, generator=generator) + skew
            if gate is not None:
                indices = gate.route(logits, bias, logits.dtype)[1]
            else:
                indices = (logits.softmax(-1) + bias).topk(top_k).indices
            load = torch.bincount(indices.flatten(), minlength=num_experts) / len(logits)
            needed[rate] = step
            if load.max() * 4 <= 1.3:
                break
            bias -= rate * (load - 1 / 4)
    return min(rates, key=lambda rate: needed[rate])


def test_the_best_rate_stays_across_expert_counts() -> None:
    """At fixed sparsity: on sigmoid scores and on softmax logits, not on softmax probabilities."""
    spread = {}
    for kind, rates in {
        "sigmoid": [0.25, 0.5, 1.0, 2.0],
        "softmax": [1.0, 2.0, 4.0, 8.0],
        "probability": [2.0**-7, 2.0**-6, 2.0**-2, 2.0**-1],
    }.items():
        counts = (8, 32) if kind == "probability" else (8, 32, 128)  # at 128 no rate balances probabilities
        best = [best_rate(num_experts, kind, rates) for num_experts in counts]
        spread[kind] = max(best) / min(best)
    assert spread["sigmoid"] <= 2 and spread["softmax"] <= 2
    assert spread["probability"] >= 8


# -- persistence -------------------------------------------------------------------------------------------------------
@BOTH
def test_a_resumed_run_is_the_same_run(family: str) -> None:
    whole = trained(*balanced(family), last=4)
    model, balancer = balanced(family)
    trained(model, balancer, last=2)
    state = model.state_dict()

    model = build(family, seed=1)
    if family == INJECTED:
        with pytest.raises(RuntimeError, match=r"gate\.selection\.bias"):
            model.load_state_dict(state)
        LoadBalancer(model, rate=0, inject=True)
    model.load_state_dict(state)
    balancer = LoadBalancer(model, rate=RATE)
    assert torch.equal(trained(model, balancer, first=2, last=4), whole)


def test_saved_biases_must_be_there_and_fit(tmp_path: Path) -> None:
    _, balancer = balanced(INJECTED)
    with pytest.raises(BalanceError, match=r"the selection bias of model\.layers\.1\.mlp\.gate"):
        balancer.load(tmp_path)
    balancer.save(tmp_path)
    other = LoadBalancer(build(INJECTED, num_local_experts=4), rate=RATE, inject=True)
    with pytest.raises(BalanceError, match="another model"):
        other.load(tmp_path)


# -- Trainer -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def text() -> PackedDataset:
    return PackedDataset(stdlib_tokens(ByteTokenizer())[0], 64, max_blocks=2000)


def fit(
    family: str, folder: Path, text: PackedDataset, callback: LoadBalancingCallback, resume: Any = None, **settings: Any
) -> Any:
    changes: dict[str, Any] = {"n_group": 1} if family == NATIVE else {}
    arguments: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    model = build(family, vocab_size=256, **changes)
    trainer = MoETrainer(model, TrainingArguments(str(folder), **arguments), train_dataset=text, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@BOTH
def test_imbalance_falls_with_the_callback_and_only_with_it(family: str, tmp_path: Path, text: PackedDataset) -> None:
    worst, losses = {}, {}
    for rate in (0.0, 0.1 if family == INJECTED else 0.03):
        callback = LoadBalancingCallback(rate, inject=family == INJECTED)
        trainer = fit(family, tmp_path, text, callback, max_steps=100, per_device_train_batch_size=8)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all({"moe/max_over_mean", "moe/starved", "moe/bias_range"} <= entry.keys() for entry in logged)
        assert any(key.startswith("moe/entropy/model.layers.") for key in logged[0])
        worst[rate > 0] = sum(entry["moe/max_over_mean"] for entry in logged[-4:]) / 4
        losses[rate > 0] = logged[-1]["loss"]
    assert worst[True] < 2.4  # the text is the running Python's: 2.21 with 3.12's
    assert worst[False] > 3.0
    assert losses[True] < losses[False] + 0.1


@BOTH
def test_a_resumed_trainer_goes_on_bit_for_bit(family: str, tmp_path: Path, text: PackedDataset) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = LoadBalancingCallback(RATE, inject=family == INJECTED)
    fit(family, tmp_path, text, whole, **settings)
    assert whole.balancer is not None and whole.balancer.steps == 6, "one step per optimizer step"
    checkpoint = tmp_path / "checkpoint-3"
    weights = load_file(checkpoint / "model.safetensors")
    name = "selection.bias" if family == INJECTED else "e_score_correction_bias"
    saved = [bias for key, bias in weights.items() if key.endswith(name)]
    assert len(saved) == len(whole.balancer.routes) and all(bias.any() for bias in saved)
    assert not (checkpoint / FILE).exists(), "nothing that the weights do not say"

    resumed = LoadBalancingCallback(RATE, inject=family == INJECTED)
    fit(family, tmp_path, text, resumed, resume=str(checkpoint), **settings)
    assert resumed.balancer is not None and resumed.balancer.steps == 6
    assert torch.equal(resumed.balancer.bias, whole.balancer.bias)

    if family == INJECTED:
        without = {key: value for key, value in weights.items() if not key.endswith(name)}
        save_file(without, checkpoint / "model.safetensors", metadata={"format": "pt"})
        again = LoadBalancingCallback(RATE, inject=True)
        with pytest.raises(BalanceError, match="the selection bias"):
            fit(family, tmp_path, text, again, resume=str(checkpoint), **settings)
        # What versions before 0.2 wrote: the biases in a file of their own.
        save_file(
            {key.removesuffix(".selection.bias"): bias for key, bias in weights.items() if name in key},
            checkpoint / FILE,
        )
        fit(family, tmp_path, text, again, resume=str(checkpoint), **settings)
        assert again.balancer is not None and torch.equal(again.balancer.bias, whole.balancer.bias)


def test_a_step_that_float16_skips_moves_no_bias(tmp_path: Path) -> None:
    """A real gradient scaler, a real overflow: neither weights nor biases move; the next step moves both."""
    model = build(NATIVE).train()
    callback = LoadBalancingCallback(RATE)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(arguments, state, control, model=model)
    balancer = callback.balancer
    assert balancer is not None
    weight = model.lm_head.weight
    Accelerator(cpu=True)  # the optimizer wrapper below wants its state
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer = AcceleratedOptimizer(sgd, scaler=scaler)
    for skipped in (True, False):
        before = weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=tokens(), labels=tokens()).loss
        scaler.scale(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        callback.on_optimizer_step(arguments, state, control, optimizer=optimizer)
        assert optimizer.step_was_skipped is skipped
        assert torch.equal(before, weight) is skipped
        assert bool(balancer.bias.any()) is not skipped
        assert not balancer.counts.any(), "what was counted for a skipped step does not go into the next"
        assert balancer.steps == (not skipped)
        scaler.update(new_scale=1.0)


@pytest.mark.slow
def test_smallest_bench(tmp_path: Path) -> None:
    bench.main(["--smallest", "--device", "cpu", "--out", str(tmp_path / "balance.json")])
    report = json.loads((tmp_path / "balance.json").read_text())
    assert [result["name"] for result in report["results"]] == ["native bias, cpu", "injected bias, cpu"]
    assert all(result["target"] == 1.02 and result["ratio"] > 0 for result in report["results"])
