"""What is looked at in a coordinate check: a model's activations, found through the roles of its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from moe_param.parameterization import Parameterization
from moe_param.structure.dispatch import is_experts
from moe_param.structure.roles import Structure, read_structure
from moe_param.structure.trace import forward_inputs, shared_trace

QUANTITIES = (
    "embedding",
    "attention_output",
    "attention_output_by_weight",
    "attention_output_by_input",
    "router_logits",
    "router_logits_by_weight",
    "router_logits_by_input",
    "expert_hidden",
    "expert_hidden_by_weight",
    "expert_hidden_by_input",
    "expert_output",
    "expert_output_by_down",
    "expert_output_by_up",
    "moe_output",
    "mlp_output",
    "mlp_output_by_weight",
    "mlp_output_by_input",
    "residual",
    "logits",
    "logits_by_weight",
    "logits_by_input",
)
"""What is watched. Branch outputs are taken before the forward multiplier that was folded into them. Single experts are
watched where they use transformers' experts interface; elsewhere moe_output, of the block with all that it adds up.

The change of what a module puts out has two parts, which can hide each other: by_weight is what its new weights make of
its input that its initial ones do not, W_t·x_t − W_0·x_t; by_input is what its initial weights make of the change of
its input, W_0·x_t − W_0·x_0. Of an expert's output they are by_down, and by_up: its new hidden units through its
initial down projection, which the paper asks to be Θ(1) by itself (Desideratum 3)."""


PARTS = {"expert_output": ("expert_output_by_down", "expert_output_by_up")}
"""Where the two parts have names of their own."""


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
        self.modules = dict(model.named_modules())
        parameters = (*model.parameters(), *(head.parameters() if head else ()))
        self.initial = {parameter: parameter.detach().clone() for parameter in parameters}
        self.again = False
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
                logits_of(self.model, self.head, batch)
        finally:
            for handle in handles:
                handle.remove()
            self.model.train(mode)
        return self.seen

    def _hooks(self) -> list[tuple[nn.Module, Any]]:
        def keep(quantity: str, divide: float = 1.0) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                self._keep(quantity, _first(out) / divide)

            return hook

        def keep_parts(quantity: str, divide: float = 1.0) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                if not self.again:  # hooks see the module's second forward pass too
                    self._keep(quantity, _first(out) / divide, self._with_initial(module, args, kwargs) / divide)

            return hook

        def keep_input(quantity: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                self._keep(quantity, args[0] if args else kwargs["hidden_states"])

            return hook

        hooks: list[tuple[nn.Module, Any]] = [(self.model.get_input_embeddings(), keep("embedding"))]
        routers = {}
        for name, info in self.structure.parameters.items():
            owner = name.rpartition(".")[0]
            if info.role == "attention_out" and name.endswith("weight"):
                hooks.append((self.modules[owner], keep_parts("attention_output", self.rules[name].multiplier)))
            elif info.role == "dense_down" and name.endswith("weight"):
                hooks.append((self.modules[owner], keep_parts("mlp_output", self.rules[name].multiplier)))
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
        hooks.append((head, keep_parts("logits")))
        return hooks

    def _keep(self, quantity: str, value: torch.Tensor, by_initial: torch.Tensor | None = None) -> None:
        """One more tensor of a quantity, and its two parts, given what the initial weights make of the same input."""
        weight, given = PARTS.get(quantity, (f"{quantity}_by_weight", f"{quantity}_by_input"))
        found = {quantity: value}
        if by_initial is not None:
            found |= {weight: value - by_initial, given: by_initial}
        for name, tensor in found.items():
            self.seen.setdefault(name, []).append(tensor.detach().float())

    def _with_initial(self, module: nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
        """What a module puts out first with the weights it had before training."""
        self.again = True
        try:
            return _first(functional_call(module, self._initial(module), args, kwargs))
        finally:
            self.again = False

    def _initial(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The parameters of a module before training, by their names in it."""
        return {name: self.initial[parameter] for name, parameter in module.named_parameters()}

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
            before = self._initial(module)
            self._keep(
                "router_logits",
                nn.functional.linear(hidden, module.weight, module.bias),
                nn.functional.linear(hidden, before["weight"], before.get("bias")),
            )

        def returned(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if self.again:
                return
            if not fresh[0]:
                self._keep("router_logits", _first(out), self._with_initial(module, args, kwargs))
            fresh[0] = False

        hooks: list[tuple[nn.Module, Any]] = [(linear, score)] if isinstance(linear, nn.Linear) else []
        return hooks if hooks and owner == name else [*hooks, (self.modules[name], returned)]

    def _keep_experts(self, name: str, divide: float) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            route = self.routes.setdefault(name, given["top_k_index"].detach().clone())
            tokens = given["hidden_states"].reshape(-1, given["hidden_states"].shape[-1])
            now, before = dict(module.named_parameters()), self._initial(module)
            hidden = expert_hidden(module, now, tokens, route)
            self._keep("expert_hidden", hidden, expert_hidden(module, before, tokens, route))
            self._keep(
                "expert_output",
                expert_output(module, now, hidden, route) / divide,
                expert_output(module, before, hidden, route) / divide,
            )

        return hook


def _around(first: str, second: str) -> str:
    """The innermost module that both are in, or that is one of them."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first.split("."), second.split("."), strict=False))
    return ".".join(name for name, _ in same)


def expert_hidden(
    experts: Any, weights: Mapping[str, torch.Tensor], tokens: torch.Tensor, route: torch.Tensor
) -> torch.Tensor:
    """Hidden units of single experts.

    Args:
        experts: an experts module of transformers' interface. weights: its parameters, by name.
        tokens: (tokens, width). route: (tokens, top_k), the expert of each.

    Returns:
        (tokens·top_k, expert_size).
    """
    repeated = tokens.repeat_interleave(route.shape[-1], dim=0)
    up = _linear(experts, weights, "gate_up_proj" if experts.has_gate else "up_proj", repeated, route)
    hidden: torch.Tensor = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
    return hidden


def expert_output(
    experts: Any, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, route: torch.Tensor
) -> torch.Tensor:
    """Outputs of single experts, before they are weighted and summed: (tokens·top_k, width), of their hidden units."""
    return _linear(experts, weights, "down_proj", hidden, route)


def _linear(
    experts: Any, weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor, route: torch.Tensor
) -> torch.Tensor:
    index = route.reshape(-1)
    out = _per_expert(x, weights[name], index, bool(experts.is_transposed))
    return out + weights[f"{name}_bias"][index] if experts.has_bias else out


def _first(out: Any) -> torch.Tensor:
    found: torch.Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return found


def _per_expert(x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Row i of `x` through the weight of expert `index[i]`: (rows, out)."""
    out = x.new_empty(len(x), weight.shape[2 if transposed else 1])
    for e in index.unique().tolist():
        rows = index == e
        out[rows] = x[rows] @ (weight[e] if transposed else weight[e].T)
    return out


def logits_of(model: PreTrainedModel, head: nn.Linear | None, batch: torch.Tensor) -> torch.Tensor:
    out = model(**forward_inputs(model, batch))
    return out.logits if head is None else head(out.last_hidden_state)
