"""Coordinate check: do activations move by the same amount at every scale?

Trains the same architecture for a few steps at several sizes along one axis and fits, for every kind of activation,
the exponent with which its size at initialization and its change by training grow with that axis. Under a sound
parameterization changes neither grow nor vanish (Yang et al., arXiv:2203.03466, Appendix D.1; the quantities that
arXiv:2601.20205 asks to be Θ(1): Section 3.3, Desiderata 1-3).
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from moe_param.applying import apply
from moe_param.errors import MoeParamError
from moe_param.parameterization import Parameterization
from moe_param.scaling.spec import DEFAULT_SPEC, ScalingSpec
from moe_param.statistics import half_width, slope
from moe_param.structure.roles import Structure, read_structure
from moe_param.structure.scaling_config import scale_config
from moe_param.structure.shape import AXES, Shape, ShapeError
from moe_param.structure.trace import is_experts, model_class_for

QUANTITIES = (
    "embedding",
    "attention_output",
    "router_logits",
    "expert_hidden",
    "expert_output",
    "expert_output_by_up",
    "moe_output",
    "residual",
    "logits",
)
"""What is watched. Branch outputs are taken before the forward multiplier that was folded into them.
expert_output_by_up is an expert's new hidden units through its initial down projection: the part of its change that
comes from updating the up projection, which the paper asks to be Θ(1) by itself (Desideratum 3)."""

GROW, VANISH = 0.2, -0.6
"""Verdict: a change may not grow faster than size^0.2. It may fall as size^-0.5 where it is an average of many
independent parts (top_k experts, α·n hidden units, early logits), and not faster than size^-0.6. The residual stream
may do neither beyond 0.2, but on depth, where in the first steps it is such an average over layers."""


class CoordCheckError(MoeParamError):
    """A check that cannot be run: an unknown axis, too few factors, a factor at which sizes do not divide."""


@dataclass(frozen=True)
class Slope:
    """Exponent of size, with a 95% confidence interval over seeds (the interval is nan with one seed)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """Whether one quantity behaves, and why."""

    passed: bool
    reason: str


@dataclass
class CoordCheck:
    """The result of `coord_check`.

    records: one per (factor, seed): {"factor", "seed", "loss": per step, "init": {quantity: RMS},
        "change": per step {quantity: RMS of the difference from initialization}, "weights": {role: RMS change}}.
    """

    axis: str
    factors: tuple[float, ...]
    spec: str
    base_shape: Shape
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def slopes(self) -> dict[str, dict[str, Slope]]:
        """{"init" | "change": {quantity: Slope}}; changes after the last step."""
        return {
            "init": {q: self._slope(lambda r, q=q: r["init"].get(q)) for q in self.quantities},
            "change": {q: self._slope(lambda r, q=q: r["change"][-1].get(q)) for q in self.quantities},
        }

    @property
    def quantities(self) -> tuple[str, ...]:
        """The watched quantities this model has."""
        return tuple(q for q in QUANTITIES if self.records and q in self.records[0]["init"])

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Per quantity, judged by its change after the last step.

        Values at initialization are not judged: initial logits and initial expert outputs are meant to fall with size
        (their learned part is what stays), which makes them the known false alarms of coordinate checks.
        """
        verdicts = {}
        diverged = sorted({r["factor"] for r in self.records if not all(map(math.isfinite, r["loss"]))})
        for quantity, found in self.slopes["change"].items():
            floor = -GROW if quantity == "residual" and self.axis != "depth" else VANISH
            if diverged:
                verdicts[quantity] = Verdict(False, f"training diverged at factor {diverged}")
            elif found.value > GROW:
                verdicts[quantity] = Verdict(False, f"its change grows as {self.axis}^{found.value:.2f}")
            elif found.value < floor:
                verdicts[quantity] = Verdict(False, f"its change vanishes as {self.axis}^{found.value:.2f}")
            else:
                why = "an average of ever more independent parts" if found.value < -GROW else "it stays"
                verdicts[quantity] = Verdict(True, f"{self.axis}^{found.value:.2f}: {why}")
        return verdicts

    @property
    def passed(self) -> bool:
        """Whether every quantity behaves."""
        return all(verdict.passed for verdict in self.verdicts.values())

    def _slope(self, value: Any) -> Slope:
        per_seed: dict[int, list[tuple[float, float]]] = {}
        for record in self.records:
            measured = value(record)
            if measured is not None and math.isfinite(measured) and measured > 0:
                per_seed.setdefault(record["seed"], []).append((math.log(record["factor"]), math.log(measured)))
        slopes = [slope(*zip(*points)) for points in per_seed.values() if len(points) > 1]
        if not slopes:
            return Slope(math.nan, math.nan, math.nan)
        mean = statistics.fmean(slopes)
        half = half_width(slopes)
        half = math.nan if half is None else half
        return Slope(mean, mean - half, mean + half)

    # -- output ------------------------------------------------------------------------------------------------
    def to_json(self, path: str | Path | None = None) -> str:
        """Everything measured and concluded, as JSON text; also written to `path` if given."""
        text = json.dumps(
            {
                "axis": self.axis,
                "factors": list(self.factors),
                "spec": self.spec,
                "base_shape": asdict(self.base_shape),
                "passed": self.passed,
                "slopes": {kind: {q: asdict(s) for q, s in found.items()} for kind, found in self.slopes.items()},
                "verdicts": {q: asdict(v) for q, v in self.verdicts.items()},
                "records": self.records,
            },
            indent=1,
        )
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def plot(self, path: str | Path) -> None:
        """Small multiples, log-log: one panel per quantity, its size at initialization and its change per step."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        columns = min(4, len(self.quantities))
        rows = -(-len(self.quantities) // columns)
        figure, axes = pyplot.subplots(rows, columns, figsize=(3.1 * columns, 2.8 * rows), squeeze=False, sharex=True)
        steps = len(self.records[0]["change"])
        colors = pyplot.get_cmap("viridis")
        for panel in axes.flat[len(self.quantities) :]:
            panel.set_axis_off()
        for panel, quantity in zip(axes.flat, self.quantities, strict=False):
            x, y = self._mean(lambda r, q=quantity: r["init"][q])
            panel.plot(x, y, "k--", marker=".", label="initial size")
            for step in range(steps):
                x, y = self._mean(lambda r, q=quantity, s=step: r["change"][s][q])
                last = step == steps - 1
                label = f"change, step {step + 1}" if last or step == 0 else None
                panel.plot(x, y, color=colors(step / max(steps - 1, 1)), lw=2 if last else 1, marker=".", label=label)
            verdict = self.verdicts[quantity]
            slope = self.slopes["change"][quantity].value
            color = "tab:green" if verdict.passed else "tab:red"
            panel.set_title(f"{quantity.replace('_', ' ')}: {slope:+.2f}", fontsize=10, color=color)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
        axes.flat[0].legend(fontsize=7)
        figure.supxlabel(f"{self.axis} / base", fontsize=10)
        word = "passed" if self.passed else "FAILED"
        figure.suptitle(f"{self.spec}, {self.axis}: {word} (exponent of the last change in each title)", fontsize=11)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)

    def _mean(self, value: Any) -> tuple[list[float], list[float]]:
        x, y = [], []
        for factor in sorted({r["factor"] for r in self.records}):
            values = [value(r) for r in self.records if r["factor"] == factor]
            values = [v for v in values if v > 0 and math.isfinite(v)]
            if values:
                x.append(factor)
                y.append(math.exp(sum(map(math.log, values)) / len(values)))
        return x, y


def coord_check(
    config: PretrainedConfig,
    base_shape: Shape,
    *,
    axis: str,
    factors: Sequence[float] = (1, 2, 4, 8),
    spec: str | Path | Mapping[str, Any] | ScalingSpec = DEFAULT_SPEC,
    steps: int = 5,
    seeds: int = 3,
    lr: float = 2**-7,
    eps: float = 1e-12,
    batch: torch.Tensor | None = None,
    init_std: float | None = None,
    constants: Mapping[str, Mapping[str, float]] | None = None,
    processes: int = 1,
    resume: str | Path | None = None,
    model_class: type[PreTrainedModel] | None = None,
    progress: bool = False,
) -> CoordCheck:
    """Trains `config` at `base_shape` with `axis` multiplied by each of `factors` and compares how far it moves.

    Args:
        config: the architecture; its own sizes do not matter.
        base_shape: where factor 1 stands.
        axis: width (expert_size follows, so that α of arXiv:2601.20205 is fixed), depth, num_experts (top_k follows) or
            expert_size.
        factors: at least two.
        spec, init_std, constants: as in `moe_param.apply`.
        steps, seeds, lr, eps: AdamW steps on one batch, number of initializations, and one learning rate for all.
        batch: (batch, length) token ids to train and measure on; random ones by default.
        processes: at most one per core is used.
        resume: a file of finished runs (JSON lines); runs in it are not repeated, new ones are added as they finish.

    Raises:
        CoordCheckError: an unknown axis, fewer than two factors, sizes that are not whole.
        ShapeError, StructureError, …: as `scale_config` and `apply`.
    """
    if axis not in AXES:
        raise CoordCheckError(f"unknown axis {axis!r} (valid: {', '.join(AXES)})")
    if len(set(factors)) < 2:
        raise CoordCheckError(f"a slope needs at least two factors, got {list(factors)}")
    table = ScalingSpec.load(spec)
    model_class = model_class or model_class_for(config)
    jobs = []
    for factor in sorted(set(factors)):
        try:
            sizes = {k: v for k, v in asdict(base_shape.along(axis, factor)).items() if k != "head_dim"}
            scaled = scale_config(config, **sizes, model_class=model_class)
        except ShapeError as error:
            raise CoordCheckError(f"{axis} × {factor:g}: {error}") from error
        for seed in range(seeds):
            ids = batch if batch is not None else _random_batch(config, seed)
            jobs.append(
                {
                    "model_class": model_class,
                    "config": scaled,
                    "base_shape": replace(base_shape, head_dim=None),
                    "spec": table,
                    "factor": factor,
                    "seed": seed,
                    "steps": steps,
                    "lr": lr,
                    "eps": eps,
                    "batch": ids,
                    "init_std": init_std,
                    "constants": constants,
                }
            )
    signature = f"{axis} {asdict(base_shape)} {table.to_dict()} {steps} {lr} {eps} {init_std} {constants}"
    result = CoordCheck(axis, tuple(sorted(set(factors))), table.name, base_shape)
    result.records = _run_all(jobs, processes, Path(resume) if resume else None, signature, progress)
    return result


def _random_batch(config: PretrainedConfig, seed: int) -> torch.Tensor:
    vocabulary = config.get_text_config().vocab_size
    return torch.randint(vocabulary, (4, 32), generator=torch.Generator().manual_seed(seed))


def _run_all(
    jobs: list[dict[str, Any]], processes: int, resume: Path | None, signature: str, progress: bool
) -> list[dict[str, Any]]:
    done: dict[tuple[float, int], dict[str, Any]] = {}
    if resume is not None and resume.exists():
        for line in resume.read_text().splitlines():
            record = json.loads(line)
            if record.pop("signature") == signature:
                done[record["factor"], record["seed"]] = record
    todo = [job for job in jobs if (job["factor"], job["seed"]) not in done]

    def finished(record: dict[str, Any]) -> None:
        done[record["factor"], record["seed"]] = record
        if resume is not None:
            with resume.open("a") as file:
                file.write(json.dumps({**record, "signature": signature}) + "\n")

    for record in _track(_results(todo, processes), len(todo), progress):
        finished(record)
    return [done[job["factor"], job["seed"]] for job in jobs]


def _results(jobs: list[dict[str, Any]], processes: int) -> Iterable[dict[str, Any]]:
    workers = min(processes, os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        yield from map(_run, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for future in as_completed([pool.submit(_run, job) for job in jobs]):
            yield future.result()


def _track(results: Iterable[dict[str, Any]], total: int, progress: bool) -> Iterable[dict[str, Any]]:
    if not progress:
        return results
    from rich.progress import track

    return track(results, total=total, description="coordinate check")


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """One model, one seed: build, train, measure."""
    torch.manual_seed(job["seed"])
    model = job["model_class"](copy.deepcopy(job["config"]))
    parameterization = apply(
        model,
        job["base_shape"],
        spec=job["spec"],
        seed=job["seed"],
        init_std=job["init_std"],
        constants=job["constants"],
        experts=None,
    )
    head = _head(model, job["seed"])
    groups = parameterization.param_groups(model, lr=job["lr"], eps=job["eps"])
    if head is not None:
        groups.append({"params": [head.weight], "lr": job["lr"], "eps": job["eps"]})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    watch = _Watch(model, parameterization, head)
    batch = job["batch"]
    initial = watch.run(batch)
    record: dict[str, Any] = {"factor": job["factor"], "seed": job["seed"], "loss": [], "change": []}
    record["init"] = {q: _rms(values) for q, values in initial.items()}
    model.train()
    for _ in range(job["steps"]):
        loss = torch.nn.functional.cross_entropy(
            _logits(model, head, batch)[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record["loss"].append(float(loss.detach()))
        now = watch.run(batch)
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
    out = model(input_ids=batch, use_cache=False)
    return out.logits if head is None else head(out.last_hidden_state)


def _rms(tensors: Sequence[torch.Tensor]) -> float:
    total = sum(float(t.double().square().sum()) for t in tensors)
    return math.sqrt(total / max(1, sum(t.numel() for t in tensors)))


class _Watch:
    """Runs a model and collects its activations by what they are, found through the roles of its parameters.

    Branch outputs are divided by the multiplier folded into them. Experts are followed for the tokens they were given
    at initialization, so that a change of routing is not taken for a change of an expert.
    """

    def __init__(self, model: PreTrainedModel, parameterization: Parameterization, head: nn.Linear | None) -> None:
        self.model = model
        self.head = head
        self.rules = parameterization.rules
        self.num_experts = parameterization.shape.num_experts
        # 1/top_k makes the mean of the experts out of their sum: it stays in what is measured of the MoE output.
        exponent = parameterization.spec.multipliers.get("unnormalized_gates", {}).get("top_k", 0.0)
        self.gates = (parameterization.shape.top_k / parameterization.base_shape.top_k) ** exponent
        self.structure: Structure = read_structure(type(model), model.config)
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.routes: dict[str, torch.Tensor] = {}
        self.downs: dict[str, torch.Tensor] = {}
        self.modules = dict(model.named_modules())

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
        routers = set()
        for name, info in self.structure.parameters.items():
            owner = name.rpartition(".")[0]
            if info.role == "attention_out" and name.endswith("weight"):
                hooks.append((self.modules[owner], keep("attention_output", self.rules[name].multiplier)))
            elif info.role == "router" and info.fan_out is not None and info.fan_out >= self.num_experts:
                linear = isinstance(self.modules[owner], nn.Linear)  # some routers return probabilities first
                routers.add(owner if linear else self._router_of(owner))
            elif info.role == "final_norm" and name.endswith("weight"):
                hooks.append((self.modules[owner], keep_input("residual")))
        hooks += [(self.modules[name], keep("router_logits")) for name in sorted(routers)]
        for name, module in self.modules.items():
            if is_experts(module) and f"{name}.down_proj" in self.rules:
                rule = self.rules[f"{name}.down_proj"]
                hooks.append((module, self._keep_experts(name, rule.multiplier)))
                mean = self.gates if "unnormalized_gates" in rule.folded else 1.0
                hooks.append((module, keep("moe_output", rule.multiplier / mean)))
        head: Any = self.head or self.model.get_output_embeddings()
        hooks.append((head, keep("logits")))
        return hooks

    def _router_of(self, owner: str) -> str:
        """The router module a router's weight is in; the weight's own module where no tokens were seen in it."""
        return next((n for n in self.structure.routers if owner == n or owner.startswith(n + ".")), owner)

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
