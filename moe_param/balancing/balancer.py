"""Load balancing without an auxiliary loss: selection biases follow the load of the experts (arXiv:2601.20205, eq. 2).

After every optimizer step, b_i ← b_i − rate·(Load_i − κ), where Load_i is the share of the step's tokens that were
routed to expert i (Σ_i Load_i = top_k) and κ = top_k / num_experts. The biases take part in selection only.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from moe_param.balancing.gates import checked
from moe_param.balancing.routing import Route, check_routed, find_routes, unwrap
from moe_param.balancing.saved import FILE, read_biases
from moe_param.balancing.selection import BalanceError, place, require_selection_biases, selection_of, take_away

RULES = ("proportional", "sign")

Rate = float | Callable[[int], float]


def linear_decay(rate: float, steps: int) -> Callable[[int], float]:
    """A rate that falls linearly to 0 over `steps` optimizer steps."""
    return lambda step: rate * max(0.0, 1.0 - step / steps)


class LoadBalancer:
    """Counts where tokens go, and moves the selection biases after each step.

        balancer = LoadBalancer(model, rate=0.01)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            balancer.step()

    Tokens are counted in training mode, in forward passes of the model or of a model inside it; where such a pass is
    given a 2-D attention mask, padding is left out. What gradient checkpointing runs again in the backward pass is not
    counted again. Counts add up over micro-batches and are summed over processes by one collective per step. The load
    is a share, so tensor-parallel ranks that see the same tokens change nothing. Nothing here waits for the device,
    except `metrics`. A copy of the model has the biases, and is not counted.

    Make it after the model has its weights and wrappers (DDP, FSDP2, checkpointing) and before it is first compiled.

    Args:
        model: a transformers model, wrapped or not.
        rate: step of the biases (the paper's η_bias), a number or a function of the steps done (`linear_decay`).
            0 only counts, which works for every model.
        rule: "proportional" (2601.20205, eq. 2) or "sign" (2408.15664).
        inject: give routers without a selection bias one. This changes what the model computes. It is saved with
            the weights and named in the config, but plain transformers knows nothing of it: after `from_pretrained`
            call `load_selection_biases`.
        recentre: take the mean out of the biases of each layer (a constant shift does not change a selection).
        process_group: the processes that see different data; default: all.
        strict: refuse, not warn, when the model's auxiliary loss is on at the same time.

    Raises:
        BalanceError: routers that cannot be biased, with the reasons; an unknown rule; a model that was loaded
            without the biases its config names.
        RoutingError: a model without router modules.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: Rate,
        rule: Literal["proportional", "sign"] = "proportional",
        inject: bool = False,
        recentre: bool = False,
        process_group: dist.ProcessGroup | None = None,
        strict: bool = False,
    ) -> None:
        check_settings(rate, rule)
        self.model: PreTrainedModel = unwrap(model)
        self.rate, self.rule, self.recentre, self.group = rate, rule, recentre, process_group
        require_selection_biases(self.model)
        self.routes = find_routes(self.model, inject=inject)
        check_routed(self.model, self.routes)
        self.moved = [row for row, route in enumerate(self.routes) if not route.fixed]
        if rate != 0:
            _check_movable(self.routes, inject)
            _check_auxiliary_loss(self.model, strict)
        self._place()
        first = next(self.routes[0].module.parameters())
        shape = (len(self.routes), self.routes[0].num_experts)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=first.device)
        self.last_load = torch.zeros(shape, device=first.device)  # of the last step; Σ_i = top_k
        # float32 whatever the model's dtype: a bias kept in bfloat16 stops moving when steps fall below its last bit.
        self.bias = torch.zeros(shape, device=first.device)
        self.top_k = torch.tensor([[float(route.top_k)] for route in self.routes], device=first.device)
        mask = torch.zeros(len(self.routes), 1)
        mask[self.moved] = 1.0
        self.movable = mask.to(first.device)
        self.steps = 0
        self._running: list[tuple[nn.Module, torch.Tensor | None]] = []  # forward passes, each with its mask
        self._read()
        self._handles = []
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):  # the model, and those inside that may be called by themselves
                enter = _Hook(self._enter(module))
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(_Hook(self._leave), always_call=True))
        for row, route in enumerate(self.routes):
            self._handles.append(route.module.register_forward_hook(_Hook(self._count(row, route.top_k))))

    def _place(self) -> None:
        gates = {r.name: (r.module, r.gate, r.num_experts) for r in self.routes if r.gate is not None}
        place(self.model, gates)
        for route in self.routes:
            if route.gate is not None:
                route.owner, route.leaf = selection_of(route.module), "bias"

    # -- in the forward pass -------------------------------------------------------------------------------------
    def _enter(self, module: nn.Module) -> Callable[..., None]:
        """A forward pass begins: its mask, that of the pass around it where it is given none, is used until it ends."""
        names = list(inspect.signature(module.forward).parameters)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args)), **kwargs}
            mask, tokens = given.get("attention_mask"), given.get("input_ids")
            tokens = given.get("inputs_embeds") if tokens is None else tokens
            flat = self._running[-1][1] if self._running else None
            if module.training and isinstance(mask, torch.Tensor) and mask.dim() == 2:
                length = mask.shape[1] if tokens is None else tokens.shape[1]
                flat = mask[:, -length:].reshape(-1) != 0  # a cache makes the mask longer than the tokens
            self._running.append((module, flat))

        return hook

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """The forward pass is over, also where it raised."""
        if any(running is module for running, _ in self._running):
            while self._running.pop()[0] is not module:
                pass

    def _count(self, row: int, top_k: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if not module.training or not self._running:  # outside: checkpointing runs a layer again
                return
            chosen, mask = checked(out)[2].detach().reshape(-1).to(self.counts), self._running[-1][1]
            if mask is not None and mask.numel() * top_k == chosen.numel():
                real = mask[:, None].expand(-1, top_k).reshape(-1).to(self.counts)
            else:
                real = torch.ones_like(chosen)
            self.counts[row].scatter_add_(0, chosen, real)

        return hook

    # -- after the optimizer -------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self) -> None:
        """Once per optimizer step, after it: moves the biases by the load of all tokens since the last call."""
        rate = self.rate(self.steps) if callable(self.rate) else self.rate
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts, group=self.group)
        total = self.counts.sum(-1, keepdim=True)
        some = total > 0  # a layer that was not run has no load
        num_experts = self.counts.shape[-1]
        # Load − κ = top_k·(count·E − total) / (total·E); the bracket in integers is exact, so are zero and its sign.
        excess = self.counts * num_experts - total
        share = self.top_k / total.clamp(min=1)
        torch.mul(self.counts, share, out=self.last_load)
        delta = excess.sign() if self.rule == "sign" else excess * (share / num_experts)
        self.bias.sub_(delta * some * self.movable, alpha=rate)
        if self.recentre:
            self.bias.sub_(self.bias.mean(-1, keepdim=True))
        self.discard()
        self.steps += 1
        self.write()

    def discard(self) -> None:
        """Forgets the tokens counted since the last step: for optimizer steps that were skipped."""
        self.counts.zero_()
        self._running.clear()  # what a KeyboardInterrupt left there

    def metrics(self) -> dict[str, float]:
        """Of the last step, over the layers that are balanced (over all, where none can be). Empty before it.

        max_over_mean: the largest load of an expert over the mean load, worst layer.
        starved: share of experts with less than a tenth of their share. bias_range: largest max − min of a layer.
        entropy/NAME: entropy of the load of a layer, 1 when uniform.
        """
        if not self.steps:
            return {}
        rows = self.moved or list(range(len(self.routes)))
        load, bias, num_experts = self.last_load[rows], self.bias[rows], self.bias.shape[-1]
        p = load / load.sum(-1, keepdim=True).clamp(min=1e-30)
        entropy = torch.special.entr(p).sum(-1) / math.log(max(num_experts, 2))
        values = [p.max() * num_experts, (p * num_experts < 0.1).float().mean(), (bias.amax(-1) - bias.amin(-1)).max()]
        numbers = torch.cat([torch.stack(values), entropy]).tolist()  # the one wait for the device
        names = ["max_over_mean", "starved", "bias_range", *(f"entropy/{self.routes[row].name}" for row in rows)]
        return dict(zip(names, numbers, strict=True))

    # -- the biases in the model -----------------------------------------------------------------------------------
    @torch.no_grad()
    def _read(self) -> None:
        for row, route in enumerate(self.routes):
            if (native := route.native) is not None:
                full = native.full_tensor() if isinstance(native, DTensor) else native
                self.bias[row].copy_(full.reshape(-1))

    @torch.no_grad()
    def write(self) -> None:
        """Copies `bias` into the model; for whoever changes it by hand, as each step does it."""
        for row, route in enumerate(self.routes):
            if (native := route.native) is None:
                continue
            value = self.bias[row].view(native.shape)
            if isinstance(native, DTensor):  # every rank has the whole of it, so its part costs no communication
                mesh = native.device_mesh
                whole = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
                value = whole.redistribute(placements=native.placements)
            native.copy_(value)

    # -- persistence -----------------------------------------------------------------------------------------------
    @property
    def needs_file(self) -> bool:
        """Whether the model's own state dict leaves something of the biases out: those it keeps below float32."""
        natives = [route.native for route in self.routes]
        return any(native is not None and native.dtype != torch.float32 for native in natives)

    def save(self, folder: str | Path) -> None:
        """Writes the biases (float32) and the number of steps into `folder`. One process of a job is enough.

        The weights have the biases too (in the model's dtype, where they are its own); this is for going on exactly.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {self.routes[row].name: self.bias[row].cpu().clone() for row in self.moved}
        save_file(tensors, Path(folder) / FILE, metadata={"steps": str(self.steps)})

    def load(self, folder: str | Path) -> None:
        """Takes over what `save` wrote or, without it, the injected biases among the weights in `folder`.

        Raises:
            BalanceError: nothing there, or the biases of another model.
        """
        path, steps = Path(folder) / FILE, self.steps
        names = [self.routes[row].name for row in self.moved]
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                steps = int((file.metadata() or {}).get("steps", 0))
        elif not any(route.gate is not None for route in self.routes):
            raise BalanceError(f"{path} does not exist: give the folder that `LoadBalancer.save` or the callback wrote")
        else:
            saved = read_biases(self.model, str(folder), names)
        wanted = {name: self.bias.shape[1:] for name in names}
        found = {name: tensor.shape for name, tensor in saved.items()}
        if found != wanted:
            raise BalanceError(f"{folder} holds the biases of another model: {found}, expected {wanted}")
        with torch.no_grad():
            for row, name in zip(self.moved, names):
                self.bias[row].copy_(saved[name])
        self.steps = steps
        self.write()

    def stop(self) -> None:
        """Counts no more. Biases, injected ones too, stay and act: the model computes what it was trained to."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def remove(self) -> None:
        """Stops, and takes injected biases off the model and its config; native ones stay as they are."""
        self.stop()
        take_away(self.model)


class _Hook:
    """A hook that copies and pickles of the model do not inherit."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    """The hook of a copy."""


def check_settings(rate: Any, rule: Any) -> None:
    """That there is such a rule, and that the rate is one.

    Raises:
        BalanceError: naming what was expected.
    """
    if rule not in RULES:
        raise BalanceError(f"rule is {rule!r}: expected one of {RULES}")
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not callable(rate) and not (number and 0 <= rate < math.inf):
        raise BalanceError(f"rate is {rate!r}: expected a number ≥ 0, or a function of the step")


def _check_movable(routes: list[Route], inject: bool) -> None:
    fixed = {route.name: route.fixed for route in routes if route.fixed}
    if not fixed:
        return
    listing = "\n  ".join(f"{name}: {reason}" for name, reason in fixed.items())
    if len(fixed) < len(routes):
        warnings.warn(f"These routers are counted, but cannot be balanced:\n  {listing}", stacklevel=3)
        return
    advice = (
        "rate=0 still counts; to balance this model use its auxiliary loss."
        if inject
        else "inject=True adds a selection bias where that is possible; the checkpoint then needs it everywhere."
    )
    raise BalanceError(f"no router of this model can be balanced:\n  {listing}\n{advice}")


def _check_auxiliary_loss(model: PreTrainedModel, strict: bool) -> None:
    configs = (model.config, model.config.get_text_config())
    asked = any(getattr(config, "output_router_logits", False) for config in configs)
    coefficient = max((getattr(config, "router_aux_loss_coef", None) or 0.0) for config in configs)
    if asked and coefficient > 0:
        message = (
            f"the auxiliary loss is on at the same time (output_router_logits, router_aux_loss_coef={coefficient}): "
            "two mechanisms would balance the same experts. Set output_router_logits=False in the config."
        )
        if strict:
            raise BalanceError(message)
        warnings.warn(message, stacklevel=3)
