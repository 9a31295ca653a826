"""One run of a coordinate check: a model of one size and seed, a few steps, and how far its activations moved."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import moe_param
from moe_param.applying import apply
from moe_param.ledger import fingerprint
from moe_param.parameterization import Parameterization
from moe_param.scaling.spec import ScalingSpec
from moe_param.structure.dispatch import is_experts
from moe_param.structure.roles import Structure, read_structure
from moe_param.structure.shape import Shape
from moe_param.structure.trace import forward_inputs, shared_trace

QUANTITIES = (
    "embedding",
    "attention_output",
    "router_logits",
    "expert_hidden",
    "expert_output",
    "expert_output_by_up",
    "moe_output",
    "mlp_output",
    "residual",
    "logits",
)
"""What is watched. Branch outputs are taken before the forward multiplier that was folded into them.
expert_output_by_up is an expert's new hidden units through its initial down projection: the part of its change that
comes from updating the up projection, which the paper asks to be Θ(1) by itself (Desideratum 3). Single experts are
watched where they use transformers' experts interface; elsewhere moe_output, of the block with all that it adds up."""


@dataclass(frozen=True)
class Run:
    """What one run is: the model at `factor` times the base, the initialization, the text, the steps."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    base_shape: Shape
    spec: ScalingSpec
    factor: float
    seed: int
    steps: int
    lr: float
    eps: float
    batch: torch.Tensor  # (batch, length) ids
    init_std: float | None = None
    constants: Mapping[str, Mapping[str, float]] | None = None
    optimizer: str = "adamw"
    matrix_lr_ratio: float | None = None

    @property
    def fingerprint(self) -> str:
        """Differs where the records may: in the architecture, the text, the versions or any other setting."""
        return fingerprint(
            {
                "model_class": f"{self.model_class.__module__}.{self.model_class.__qualname__}",
                "config": self.config.to_json_string(use_diff=False),
                "implementations": [self.config._attn_implementation, self.config._experts_implementation],
                "base_shape": asdict(self.base_shape),
                "spec": self.spec.to_dict(),
                "factor": self.factor,
                "seed": self.seed,
                "steps": [self.steps, self.lr, self.eps],
                "batch": [list(self.batch.shape), hashlib.sha256(self.batch.cpu().numpy().tobytes()).hexdigest()],
                "constants": [self.init_std, self.constants],
                **({} if self.optimizer == "adamw" else {"optimizer": [self.optimizer, self.matrix_lr_ratio]}),
                "dtype": str(torch.get_default_dtype()),
                "versions": [torch.__version__, transformers.__version__, moe_param.__version__],
            }
        )


def measure(run: Run) -> dict[str, Any]:
    """Builds, trains, measures.

    Returns:
        {"factor", "seed", "loss": per step, "init": {quantity: RMS}, "change": per step {quantity: RMS of the
        difference from initialization}, "weights": {role: RMS change}}.
    """
    torch.manual_seed(run.seed)
    model = run.model_class(copy.deepcopy(run.config))
    parameterization = apply(
        model, run.base_shape, spec=run.spec, seed=run.seed, init_std=run.init_std, constants=run.constants
    )
    head = _head(model, run.seed)
    optimizer = parameterization.optimizer(
        model, optimizer=run.optimizer, lr=run.lr, eps=run.eps, matrix_lr_ratio=run.matrix_lr_ratio
    )
    if head is not None:
        optimizer.add_param_group({"params": [head.weight], "lr": run.lr, "eps": run.eps})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    watch = Watch(model, parameterization, head)
    initial = watch.run(run.batch)
    record: dict[str, Any] = {"factor": run.factor, "seed": run.seed, "loss": [], "change": []}
    record["init"] = {q: _rms(values) for q, values in initial.items()}
    model.train()
    for _ in range(run.steps):
        logits = _logits(model, head, run.batch)[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, run.batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record["loss"].append(float(loss.detach()))
        now = watch.run(run.batch)
        change = {q: [a - b for a, b in zip(now[q], initial[q], strict=True)] for q in initial}
        record["change"].append({q: _rms(values) for q, values in change.items()})
    moved: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        moved.setdefault(parameterization.rules[name].role, []).append(p.detach() - before[name])
    record["weights"] = {role: _rms(values) for role, values in moved.items()}
    return record


def _head(model: PreTrainedModel, seed: int) -> nn.Linear | None:
    """A plain linear head for a text backbone that has none. The factor 1/width on its logits is already in the final
    norm (`moe_param.structure.roles` puts it there), so the head itself is not scaled."""
    if model.get_output_embeddings() is not None:
        return None
    embedding: Any = model.get_input_embeddings().weight
    head = nn.Linear(embedding.shape[-1], embedding.shape[0], bias=False)
    nn.init.normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    return head


def _logits(model: PreTrainedModel, head: nn.Linear | None, batch: torch.Tensor) -> torch.Tensor:
    out = model(**forward_inputs(model, batch))
    return out.logits if head is None else head(out.last_hidden_state)


def _rms(tensors: Sequence[torch.Tensor]) -> float:
    total = sum(float(t.double().square().sum()) for t in tensors)
    return math.sqrt(total / max(1, sum(t.numel() for t in tensors)))


class Watch:
    """Runs a model and collects its activations by what they are, found through the roles of its parameters.

    Branch outputs are divided by the multiplier folded into them. Experts are followed for the tokens they were given
    at initialization, so that a change of routing is not taken for a change of an expert.
    """

    def __init__(self, model: PreTrainedModel, parameterization: Parameterization, head: nn.Linear | None) -> None:
        self.model = model
        self.head = head
        self.rules = parameterization.rules
        self.num_experts = parameterization.shape.num_experts or 0
        # 1/top_k makes the mean of the experts out of their sum: it stays in what is measured of the MoE output.
        exponent = parameterization.spec.multipliers.get("unnormalized_gates", {}).get("top_k", 0.0)
        top_k, of_base = parameterization.shape.top_k, parameterization.base_shape.top_k
        self.gates = (top_k / of_base) ** exponent if top_k and of_base else 1.0
        self.structure: Structure = read_structure(type(model), model.config)
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.routes: dict[str, torch.Tensor] = {}
        self.downs: dict[str, torch.Tensor] = {}
        self.modules = dict(model.named_modules())
        _, trace = shared_trace(type(model), model.config)
        self.routers = {router.experts: router for router in trace.routers if router.mixes == "mlp"}

    def run(self, batch: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """{quantity: one tensor per module}, in eval mode, without gradients."""
        self.seen = {}
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in self._hooks()]
        mode = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                _logits(self.model, self.head, batch)
        finally:
            for handle in handles:
                handle.remove()
            self.model.train(mode)
        return self.seen

    def _hooks(self) -> list[tuple[nn.Module, Any]]:
        def keep(quantity: str, divide: float = 1.0) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                tensor = out[0] if isinstance(out, (tuple, list)) else out
                self.seen.setdefault(quantity, []).append(tensor.detach().float() / divide)

            return hook

        def keep_input(quantity: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                self.seen.setdefault(quantity, []).append(
                    (args[0] if args else kwargs["hidden_states"]).detach().float()
                )

            return hook

        hooks: list[tuple[nn.Module, Any]] = [(self.model.get_input_embeddings(), keep("embedding"))]
        routers = {}
        for name, info in self.structure.parameters.items():
            owner = name.rpartition(".")[0]
            if info.role == "attention_out" and name.endswith("weight"):
                hooks.append((self.modules[owner], keep("attention_output", self.rules[name].multiplier)))
            elif info.role == "dense_down" and name.endswith("weight"):
                hooks.append((self.modules[owner], keep("mlp_output", self.rules[name].multiplier)))
            elif info.role == "router" and info.fan_out is not None and info.fan_out >= self.num_experts:
                routers[owner] = self._router_of(owner)
            elif info.role == "final_norm" and name.endswith("weight"):
                hooks.append((self.modules[owner], keep_input("residual")))
        for owner, name in sorted(routers.items()):
            hooks += self._keep_scores(owner, name)
        for router in self.routers.values():
            rule, experts = self.rules[router.down[0]], self.modules[router.experts]
            block = router.experts if is_experts(experts) else _around(router.experts, router.module)
            if is_experts(experts):
                hooks.append((experts, self._keep_experts(router.experts, rule.multiplier)))
            mean = self.gates if "unnormalized_gates" in rule.folded else 1.0
            hooks.append((self.modules[block], keep("moe_output", rule.multiplier / mean)))
        head: Any = self.head or self.model.get_output_embeddings()
        hooks.append((head, keep("logits")))
        return hooks

    def _router_of(self, owner: str) -> str:
        """The router module a router's weight is in; the weight's own module where no tokens were seen in it."""
        return next((n for n in self.structure.routers if owner == n or owner.startswith(n + ".")), owner)

    def _keep_scores(self, owner: str, name: str) -> list[tuple[nn.Module, Any]]:
        """Hooks for the logits of the router `name`: what its linear `owner` puts out (some routers return
        probabilities first), or else what it returns first itself. A block that routes by itself returns neither."""
        linear, fresh = self.modules[owner], [False]
        if any(r.module == name and f"{r.experts}.".startswith(f"{name}.") for r in self.routers.values()):
            return []

        def score(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            hidden = args[0] if args else next(iter(kwargs.values()))
            fresh[0] = True
            logits = nn.functional.linear(hidden, module.weight, module.bias)
            self.seen.setdefault("router_logits", []).append(logits.detach().float())

        def returned(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if not fresh[0]:
                first = out[0] if isinstance(out, (tuple, list)) else out
                self.seen.setdefault("router_logits", []).append(first.detach().float())
            fresh[0] = False

        hooks: list[tuple[nn.Module, Any]] = [(linear, score)] if isinstance(linear, nn.Linear) else []
        return hooks if hooks and owner == name else [*hooks, (self.modules[name], returned)]

    def _keep_experts(self, name: str, divide: float) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            route = self.routes.setdefault(name, given["top_k_index"].detach().clone())
            down = self.downs.setdefault(name, module.down_proj.detach().clone())  # type: ignore[operator]
            tokens = given["hidden_states"].reshape(-1, given["hidden_states"].shape[-1])
            hidden, output = expert_activations(module, tokens, route)
            by_up = _per_expert(hidden, down, route.reshape(-1), bool(module.is_transposed))
            for quantity, value in (("expert_output", output), ("expert_output_by_up", by_up)):
                self.seen.setdefault(quantity, []).append(value.float() / divide)
            self.seen.setdefault("expert_hidden", []).append(hidden.float())

        return hook


def _around(first: str, second: str) -> str:
    """The innermost module that both are in, or that is one of them."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first.split("."), second.split("."), strict=False))
    return ".".join(name for name, _ in same)


def expert_activations(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden units and outputs of single experts, before they are weighted and summed.

    Args:
        experts: an experts module of transformers' interface.
        hidden_states: (tokens, width). top_k_index: (tokens, top_k).

    Returns:
        (tokens·top_k, expert_size) and (tokens·top_k, width).
    """
    tokens = hidden_states.repeat_interleave(top_k_index.shape[-1], dim=0)
    index = top_k_index.reshape(-1)
    first = "gate_up_proj" if experts.has_gate else "up_proj"

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        out = _per_expert(x, getattr(experts, name), index, experts.is_transposed)
        return out + getattr(experts, f"{name}_bias")[index] if experts.has_bias else out

    up = linear(tokens, first)
    hidden = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
    return hidden, linear(hidden, "down_proj")


def _per_expert(x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Row i of `x` through the weight of expert `index[i]`: (rows, out)."""
    out = x.new_empty(len(x), weight.shape[2 if transposed else 1])
    for e in index.unique().tolist():
        rows = index == e
        out[rows] = x[rows] @ (weight[e] if transposed else weight[e].T)
    return out
