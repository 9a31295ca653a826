"""The paper's own model: it computes the paper's equations, this package takes it, its sizes are the published ones."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moe_param
from moe_param.cli.tune import read
from moe_param.structure.roles import read_structure
from moe_param.training.pretrain import main as train_command
from moe_param.tuned import TunedError, build_config, read_tuned
from moe_param.tuning.base import read_base
from moe_param.tuning.runners import LoopRunner
from moe_param.tuning.transfer import Train
from moe_param.tuning.transfer_plan import TransferArguments, plan_runs
from recipes.paper import MoEGPTConfig, MoEGPTForCausalLM
from tests.models import KeepDouble, tokens
from tests.reference.moe_gpt import MoEGPT, Sizes
from tests.reference.side_by_side import check_weights, loss_of, take_weights, train

STD, LR, EPS, DECAY, RATE, STEPS = 0.3, 3e-3, 1e-3, 0.1, 0.02, 20
BASE = Sizes(width=16, depth=2, num_experts=4, top_k=1, expert_size=8, heads=2, head_dim=8, vocab=64, context=16)
TARGET = Sizes(width=48, depth=3, num_experts=8, top_k=2, expert_size=40, heads=6, head_dim=16, vocab=64, context=16)
CONFIGS = Path(__file__).parents[2] / "recipes" / "paper" / "configs"


def config(s: Sizes, **more: Any) -> MoEGPTConfig:
    return MoEGPTConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        num_hidden_layers=s.depth,
        num_attention_heads=s.heads,
        head_dim=s.head_dim,
        num_experts=s.num_experts,
        num_experts_per_tok=s.top_k,
        moe_intermediate_size=s.expert_size,
        max_position_embeddings=s.context,
        **{"initializer_range": STD, **more},
    )


def build(s: Sizes = BASE, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(s, **more))


# -- the paper's equations -------------------------------------------------------------------------------------------
def folded(model: Any, reference: MoEGPT) -> dict[str, tuple[torch.Tensor, float]]:
    """For each parameter of the reference: the model's tensor, and the multiplier that stands beside it unfolded. That
    of the logits is the only one: 1/L, 1/K and 1/d are in this model's own forward pass."""
    logits = 1 / reference.r.n
    found = {
        "tokens": (model.model.token_embedding.weight, 1.0),
        "positions": (model.model.position_embedding.weight, 1.0),
        "final_gain": (model.model.norm.weight, logits),
        "final_shift": (model.model.norm.bias, logits),
    }
    for i, layer in enumerate(model.model.layers):
        block = {
            "attention_gain": layer.attention_norm.weight,
            "attention_shift": layer.attention_norm.bias,
            "moe_gain": layer.moe_norm.weight,
            "moe_shift": layer.moe_norm.bias,
            "router": layer.moe.router.weight,
            "up": layer.moe.experts.up_proj,
            "down": layer.moe.experts.down_proj,
        }
        for name in ("query", "key", "value", "output"):
            linear = getattr(layer.attention, f"{name[0]}_proj")
            block |= {name: linear.weight, f"{name}_bias": linear.bias}
        found |= {f"blocks.{i}.{name}": (tensor, 1.0) for name, tensor in block.items()}
    return found


def pair(spec: str) -> tuple[Any, Any, MoEGPT]:
    """(the model, its parameterization, the reference with the same function)."""
    model = build(TARGET).double().train()
    parameterization = moe_param.apply(model, config(BASE), seed=1, spec=spec, reinit=True)
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    with torch.no_grad():  # leave the special points 0 and 1, where a wrong factor could hide
        generator = torch.Generator().manual_seed(3)
        for p in model.parameters():
            if p.dim() < 2:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    reference = MoEGPT(BASE, TARGET).double()
    take_weights(reference, folded(model, reference))
    return model, parameterization, reference


def both(
    model: Any, parameterization: Any, reference: MoEGPT, table2: bool, steps: int = STEPS
) -> tuple[list[float], list[float]]:
    balancer = moe_param.LoadBalancer(model, rate=RATE)
    with KeepDouble():
        groups = parameterization.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY)
        ours = train(loss_of(model), groups, TARGET.vocab, steps, balancer.step)
    groups = reference.groups(LR, EPS, DECAY, table2)
    return ours, train(reference.loss, groups, TARGET.vocab, steps, lambda: reference.move_biases(RATE))


@pytest.mark.parametrize("spec", ["moe-completep", "table2"])
def test_folded_training_is_the_paper_s(spec: str) -> None:
    """Losses, weights and selection biases over 20 steps of Adam and eq. (2), every size and head_dim moved."""
    model, parameterization, reference = pair(spec)
    ours, theirs = both(model, parameterization, reference, table2=spec == "table2")
    assert ours[0] - ours[-1] > 0.05, "the run must go somewhere for the comparison to mean anything"
    assert ours == pytest.approx(theirs, rel=1e-9)
    check_weights(reference, folded(model, reference), 1e-9)
    for layer, block in zip(model.model.layers, reference.blocks, strict=True):
        assert block.selection_bias.abs().max() > RATE, "loads were uneven, so biases moved"
        assert torch.allclose(layer.moe.router.selection_bias, block.selection_bias, atol=1e-6)  # ours are float32


def test_gradients_are_the_paper_s() -> None:
    model, _, reference = pair("moe-completep")
    batch = tokens(TARGET.vocab, batch=2, length=12)
    with KeepDouble():
        model(input_ids=batch, labels=batch).loss.backward()
    reference.loss(batch).backward()
    tensors = folded(model, reference)
    for name, parameter in reference.named_parameters():
        tensor, multiplier = tensors[name]
        if name.endswith("key_bias"):  # it shifts all logits of a query alike, which a softmax does not see
            assert max(tensor.grad.norm(), parameter.grad.norm()) < 1e-15
            continue
        assert (tensor.grad * multiplier - parameter.grad).norm() < 1e-9 * parameter.grad.norm(), name


@pytest.mark.parametrize(
    ("spec", "table2"), [("standard", False), ("completep", False), ("table2", False), ("moe-completep", True)]
)
def test_another_table_does_not_pass_for_it(spec: str, table2: bool) -> None:
    """Also the paper's own other table of ε: at this ε it matters which."""
    ours, theirs = both(*pair(spec), table2, steps=4)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9), "the same function to begin with"
    assert ours != pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("part", ["1/L", "1/K", "1/d", "eq. (2)"])
def test_a_model_without_a_part_is_another(part: str) -> None:
    model, parameterization, reference = pair("moe-completep")
    for layer in model.model.layers:
        if part == "1/L":
            layer.branch = 1.0
        if part == "1/K":
            layer.moe.router.register_forward_hook(lambda m, args, out: (out[0], out[1] * m.top_k, out[2]))
        if part == "1/d":
            layer.attention.scaling = TARGET.head_dim**-0.5
    if part == "eq. (2)":
        reference.move_biases = lambda rate: None  # type: ignore[method-assign]
    ours, theirs = both(model, parameterization, reference, table2=False, steps=5)
    assert ours != pytest.approx(theirs, rel=1e-6)


# -- what the package makes of it ------------------------------------------------------------------------------------
def test_it_is_read_by_structure() -> None:
    structure = read_structure(MoEGPTForCausalLM, config(TARGET))
    assert structure.shape == moe_param.Shape(width=48, depth=3, num_experts=8, top_k=2, expert_size=40, head_dim=16)
    roles = {name.removeprefix("model.layers.0."): p.role for name, p in structure.parameters.items() if ".0." in name}
    assert roles == {
        "attention_norm.weight": "norm",
        "moe_norm.weight": "norm",
        "attention.q_proj.weight": "attention_in",
        "attention.k_proj.weight": "attention_in",
        "attention.v_proj.weight": "attention_value",
        "attention.o_proj.weight": "attention_out",
        "moe.router.weight": "router",
        "moe.experts.up_proj": "expert_up",
        "moe.experts.down_proj": "expert_down",
        **{f"{norm}.bias": "bias" for norm in ("attention_norm", "moe_norm")},
        **{f"attention.{x}_proj.bias": "bias" for x in "qkvo"},
    }
    assert not structure.gaps


def test_every_axis_scales() -> None:
    at = moe_param.Shape.from_config(config(BASE))
    for axis in at.axes:
        moved = at.along(axis, 3)
        scaled = moe_param.scale_config(config(BASE), **moved.sizes)
        assert moe_param.Shape.from_config(scaled) == moved
        rules = moe_param.plan(MoEGPTForCausalLM, scaled, config(BASE)).rules
        assert {rule.folded for rule in rules.values()} == ({(), ("logits",)} if axis == "width" else {()})


def test_a_table_without_a_multiplier_leaves_the_model_s_own() -> None:
    """`mup` has no rule for depth, and `standard` none at all: this model keeps its 1/L and 1/K under both."""
    for spec in ("mup", "standard"):
        rules = moe_param.plan(MoEGPTForCausalLM, config(TARGET), config(BASE), spec=spec).rules
        assert {site for rule in rules.values() for site in rule.folded} <= {"logits"}


# -- the conventions of routing --------------------------------------------------------------------------------------
def few_steps(model: Any, steps: int = 12) -> tuple[list[float], torch.Tensor]:
    """(losses, per layer the share of tokens at each expert, over the last step)."""
    balancer = moe_param.LoadBalancer(model.train(), rate=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = train(loss_of(model), optimizer.param_groups, TARGET.vocab, steps, balancer.step)
    return losses, balancer.last_load


def test_a_router_and_biases_that_both_start_at_zero_are_refused() -> None:
    zeros = {"router_init_std": 0.0, "selection_bias_init_std": 0.0}
    with pytest.raises(ValueError, match=r"both 0.*same experts.*loss would fall.*selection_bias_init_std"):
        config(BASE, **zeros)
    changed = config(BASE)
    changed.router_init_std = 0.0
    with pytest.raises(ValueError, match="both 0"):
        AutoModelForCausalLM.from_config(changed)
    with pytest.raises(TunedError, match="both 0"):
        build_config(None, "moe_gpt", zeros)


def test_why_they_are_refused() -> None:
    """The same experts serve every token, and the loss falls all the same: nobody would notice."""
    model = build()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.moe.router.weight)
    _, load = few_steps(model, steps=1)
    assert (load.amax(-1) == 1).all()
    losses, _ = few_steps(model)
    assert losses[0] - losses[-1] > 0.05


@pytest.mark.parametrize(
    "stds", [{"router_init_std": 0.0, "selection_bias_init_std": 0.05}, {"selection_bias_init_std": 0.0}]
)
def test_each_convention_alone_trains(stds: dict[str, float]) -> None:
    model = build(**stds)
    weights = [layer.moe.router.weight for layer in model.model.layers]
    biases = [layer.moe.router.selection_bias for layer in model.model.layers]
    assert all(bool(w.any()) == ("router_init_std" not in stds) for w in weights)
    assert all(bool(b.any()) == ("router_init_std" in stds) for b in biases)
    moe_param.apply(model, config(BASE, **stds), seed=0)
    assert all(bool(b.any()) == ("router_init_std" in stds) for b in biases), "random biases are kept"
    losses, load = few_steps(model)
    assert losses[0] - losses[-1] > 0.05
    assert all(bool(w.any()) for w in weights)
    assert (load.amax(-1) < 1).all(), "tokens part, once the router has learned something"


@pytest.mark.parametrize("wrong", [{"num_experts_per_tok": 5}, {"router_init_std": -1.0}])
def test_sizes_that_do_not_fit_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MoEGPTConfig(**wrong)


# -- a transformers model like any other -----------------------------------------------------------------------------
def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = build(selection_bias_init_std=0.5)
    moe_param.apply(model, config(BASE, selection_bias_init_std=0.5), seed=0)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MoEGPTForCausalLM and loaded.lm_head.weight is loaded.model.token_embedding.weight
    for name, tensor in model.state_dict().items():  # selection biases too
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
def test_experts_backends_agree(backend: str) -> None:
    """Loss and gradients; "megablocks" is held to "eager" on CUDA and interpreted, in tests/experts."""
    found = {}
    for name in ("eager", backend):
        model = build(TARGET)
        model.set_experts_implementation(name)
        batch = tokens(TARGET.vocab, batch=2, length=12)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        found[name] = [loss.detach(), *(p.grad for p in model.parameters())]
    for ours, theirs in zip(found[backend], found["eager"], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_attention_backends_padding_and_cache_agree() -> None:
    model = build().eval()
    batch = tokens(BASE.vocab, batch=2, length=8)
    expected = model(input_ids=batch).logits
    model.set_attn_implementation("eager")
    assert torch.allclose(model(input_ids=batch).logits, expected, atol=1e-5)
    with torch.no_grad():
        start = model(input_ids=batch[:, :5], use_cache=True)
        rest = model(input_ids=batch[:, 5:], past_key_values=start.past_key_values)
    assert torch.allclose(rest.logits, expected[:, 5:], atol=1e-5)
    mask = torch.ones_like(batch)
    mask[:, 6:] = 0
    assert torch.allclose(model(input_ids=batch, attention_mask=mask).logits[:, :6], expected[:, :6], atol=1e-5)
    logits, *_ = model(input_ids=batch, return_dict=False)
    assert torch.allclose(logits, expected, atol=1e-5)
    with pytest.raises(ValueError, match="output_hidden_states: this model returns logits and the cache"):
        model(input_ids=batch, output_hidden_states=True)
    with pytest.raises(ValueError, match="max_position_embeddings = 16"):
        model(input_ids=tokens(BASE.vocab, batch=1, length=17))


def small_file(tmp_path: Path, **more: Any) -> Path:
    """A YAML file that says what to import, and a text beside it."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    overrides = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    overrides |= {"num_experts": 4, "moe_intermediate_size": 16, "max_position_embeddings": 32}
    values = {"imports": ["recipes.paper"], "model_type": "moe_gpt", "overrides": overrides}
    values |= {"train_files": [str(text)], "seq_len": 32, "validation_blocks": 4, "max_steps": 20}
    (tmp_path / "model.yaml").write_text(json.dumps(values | more))
    return tmp_path / "model.yaml"


def test_the_train_command_trains_it(tmp_path: Path) -> None:
    """By its name in a YAML file; balanced with its own biases, and what is saved loads."""
    file = small_file(tmp_path, report_to="none")
    summary = train_command([str(file), "--output_dir", str(tmp_path / "out"), "--shape", "width=32,num_experts=8"])
    assert summary["steps"] == 20 and summary["validation_loss"] < 5.4  # log 256 = 5.55
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert moe_param.Shape.from_config(loaded.config).num_experts == 8
    assert all(layer.moe.router.selection_bias.any() for layer in loaded.model.layers), "they followed the load"


@pytest.mark.slow
def test_workers_know_it(tmp_path: Path) -> None:
    """What a search and a transfer give to a process that has not seen the model; tuned.yaml says it to the next."""
    file = small_file(tmp_path, learning_rate=2**-7, max_steps=3)
    base = read_base(*read([str(file), "--output_dir", str(tmp_path)]))
    plan = plan_runs(TransferArguments(config=str(file), axes=["width=2"]))
    assert base.yaml["imports"] == ["recipes.paper"]
    given = (LoopRunner("cpu").bind(base), base.start, Train(imports=plan.imports), plan.template)
    (tmp_path / "work").write_bytes(pickle.dumps(given))
    work = f"""
import pickle, sys
search, point, transfer, run = pickle.load(open({str(tmp_path / "work")!r}, "rb"))
assert "recipes.paper" not in sys.modules
answer, outcome = search(point, 0, lambda share, loss: True), transfer(run, lambda share, loss: True)
print(answer.failure or answer.loss == outcome["validation_loss"] < 6)"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-2000:] + done.stdout


# -- the paper's sizes -----------------------------------------------------------------------------------------------
PUBLISHED = {"base": (51, 38), "124m": (None, 124), "355m": (None, 355), "2.54b": (2540, None)}
"""Total and active parameters in millions, where the paper names them."""


def formula(c: MoEGPTConfig, experts: int) -> int:
    """Appendix A, which leaves out routers, norms and biases: (50304 + 1024)·n + L·(4n² + 2·n·H·experts)."""
    n = c.hidden_size
    per_layer = 4 * n * n + 2 * n * c.moe_intermediate_size * experts
    return (c.vocab_size + c.max_position_embeddings) * n + c.num_hidden_layers * per_layer


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_paper_s_number_of_parameters(name: str) -> None:
    tuned, base = read_tuned(CONFIGS / f"{name}.yaml"), read_tuned(CONFIGS / "base.yaml")
    c = tuned.target
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(c)
    counted = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "router" not in n}
    total, active = formula(c, c.num_experts), formula(c, c.num_experts_per_tok)
    assert sum(counted.values()) == total
    small = sum(p.numel() for p in model.parameters()) - total
    assert small < 2e-3 * total, "what the paper leaves out"
    for count, published in zip((total, active), PUBLISHED[name], strict=True):
        assert (
            published is None
            or int(count / 1e6) == published
            or round(count / 1e6) == published
            or (published == 2540 and round(count / 1e7) == 254)
        )
    assert c.num_experts == 4 * c.num_experts_per_tok and c.head_dim == 64
    assert tuned.base.to_dict() == base.base.to_dict() and tuned.constants == base.constants, "from one base"


def test_all_configs_are_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PUBLISHED)
