"""How even the load of experts gets, and what that costs.

    python -m recipes.evidence.balance.run --output_dir recipes/evidence/balance/results

Trains small models on real text three ways, each from the same weights on the same batches: with nothing that balances,
with an auxiliary loss at its usual coefficient, and with selection biases. The load is then measured on held-out text.
Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import functools
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_param import LoadBalancer
from moe_param.balancing.gates import checked
from moe_param.balancing.routing import find_routes
from moe_param.parsing import parse
from moe_param.training.data.packing import PackedDataset
from moe_param.training.report import finite, hardware, versions
from moe_param.tuning.ledger import cores, run_all
from moe_param.tuning.text import corpus
from moe_param.tuning.workers import Watch

AUXILIARY_COEFFICIENT = 0.001
"""router_aux_loss_coef of qwen3_moe, ernie4_5_moe and gpt_oss in transformers. deepseek_v3 has no auxiliary loss there;
it gets the same one, on the same logits."""

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "use_cache": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A model and the rate of its biases, which depends on what they are added to."""

    bias: str
    rate: float
    config: dict[str, Any]


CASES = {
    "deepseek_v3": Case(
        "native, on sigmoid scores",
        0.03,
        {
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "qwen3_moe": Case(
        "injected, on logits",
        0.3,
        {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 16,
        },
    ),
    "ernie4_5_moe": Case(
        "native, on probabilities",
        0.01,
        {
            "moe_num_experts": 16,
            "moe_k": 4,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0,
        },
    ),
    "gpt_oss": Case(
        "injected, on logits",
        0.3,
        {
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "intermediate_size": 32,
            "head_dim": 16,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
ARMS = ("nothing", "auxiliary loss", "selection biases")

Key = tuple[str, str, int]  # family, arm, seed
TRAINING = ("steps", "batch_size", "seq_len", "learning_rate", "validation_batches")


@dataclass
class BalanceArguments:
    output_dir: str = field(default="balance", metadata={"help": "Where balance.json and the pictures go."})
    families: list[str] = field(default_factory=lambda: list(CASES), metadata={"help": "Model types to train."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the weights and the batches."})
    steps: int = field(default=500, metadata={"help": "Optimizer steps of a run."})
    batch_size: int = field(default=8, metadata={"help": "Blocks per step."})
    seq_len: int = field(default=128, metadata={"help": "Bytes per block."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak of the learning rate."})
    rate: float | None = field(default=None, metadata={"help": "Rate of the biases, for all. Default: each family's."})
    validation_batches: int = field(default=24, metadata={"help": "Batches of held-out text the load is measured on."})
    workers: int = field(default_factory=cores, metadata={"help": "Runs at a time, one thread each."})
    smallest: bool = field(default=False, metadata={"help": "Seconds instead of an hour; proves nothing."})

    def __post_init__(self) -> None:
        unknown = set(self.families) - set(CASES)
        if unknown:
            raise SystemExit(f"no settings for {', '.join(sorted(unknown))}: expected any of {', '.join(CASES)}")
        if self.smallest:
            self.seeds, self.steps, self.batch_size, self.seq_len, self.validation_batches = [0], 3, 2, 32, 2


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth, then linear decay to zero."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


class Load:
    """Counts where tokens go, whatever the mode; sees what experts are given, injected biases included."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.routes = find_routes(model)
        self.logits: dict[int, torch.Tensor] = {}
        self.counts = torch.zeros(len(self.routes), self.routes[0].num_experts, dtype=torch.int64)
        for layer, route in enumerate(self.routes):  # made after a balancer, so its hooks run first
            route.module.register_forward_hook(functools.partial(self._seen, layer))

    def _seen(self, layer: int, module: torch.nn.Module, args: Any, out: Any) -> None:
        logits, _, indices, *_ = checked(out)
        self.logits[layer] = logits
        self.counts[layer] += indices.reshape(-1).bincount(minlength=self.counts.shape[1])

    @contextmanager
    def counting(self) -> Iterator[torch.Tensor]:
        """The counts of what runs inside."""
        self.counts.zero_()
        yield self.counts

    def auxiliary_loss(self) -> torch.Tensor:
        """The Switch loss as transformers computes it, from the logits of the last forward pass."""
        route = self.routes[0]
        logits: Any = tuple(self.logits[layer].flatten(0, -2) for layer in range(len(self.routes)))
        loss: Any = load_balancing_loss_func(logits, route.num_experts, route.top_k)
        return loss


def max_over_mean(counts: torch.Tensor) -> torch.Tensor:
    """Per layer."""
    return counts.amax(-1) / counts.double().mean(-1)


def run(args: BalanceArguments, key: Key) -> dict[str, Any]:
    """Train one model one way; what its load and loss are on held-out text."""
    family, arm, seed = key
    case = CASES[family]
    training, held_out = corpus(args.seq_len)
    transformers.set_seed(seed)
    config = AutoConfig.for_model(family, **SIZES | case.config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
    start, every = time.perf_counter(), max(1, args.steps // 60)
    balancer = None
    if arm == "selection biases":
        rate = case.rate if args.rate is None else args.rate
        balancer = LoadBalancer(model, rate=rate, inject=case.bias.startswith("injected"))
    load = Load(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(lr_factor, steps=args.steps))
    model.train()
    history = []  # share of the tokens, (layer, expert), a line every few steps
    batches = itertools.islice(training.batches(args.batch_size, seed), args.steps)
    for step, ids in enumerate(batches):
        with load.counting() as counts:
            loss = model(input_ids=ids, labels=ids).loss
            if arm == "auxiliary loss":
                loss = loss + AUXILIARY_COEFFICIENT * load.auxiliary_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if balancer:
            balancer.step()
        if step % every == 0 or step == args.steps - 1:
            shares = counts / counts.sum(-1, keepdim=True)
            history.append({"step": step, "load": [[round(x, 5) for x in row] for row in shares.tolist()]})
    loss_value, total, per_batch = validate(model, load, held_out, args)
    return {
        "family": family,
        "arm": arm,
        "seed": seed,
        "validation_loss": loss_value,
        # of the load over all validation batches, per layer; and the mean over batches of each batch's own
        "max_over_mean": max_over_mean(total).tolist(),
        "worst_max_over_mean": max_over_mean(total).max().item(),
        "worst_max_over_mean_per_batch": per_batch.mean(0).max().item(),
        "bias_range": balancer.metrics()["bias_range"] if balancer else 0.0,
        "seconds": round(time.perf_counter() - start, 1),
        "history": history,
    }


@torch.no_grad()
def validate(
    model: PreTrainedModel, load: Load, held_out: PackedDataset, args: BalanceArguments
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(loss, counts of all batches (layer, expert), max over mean of each batch (batch, layer))."""
    model.eval()
    losses, totals = [], []
    size = len(held_out) // args.validation_batches  # the batches together are all of the held-out blocks in use
    for batch in range(args.validation_batches):
        ids = held_out.batch(range(batch * size, (batch + 1) * size))
        with load.counting() as counts:
            losses.append(model(input_ids=ids, labels=ids).loss.item())
        totals.append(counts.clone())
    each = torch.stack([max_over_mean(counts) for counts in totals])
    return statistics.mean(losses), torch.stack(totals).sum(0), each


def work(job: tuple[BalanceArguments, Key], watch: Watch) -> dict[str, Any]:
    return run(*job)


def settings(args: BalanceArguments, key: Key) -> dict[str, Any]:
    """What a run depends on."""
    family, arm, _ = key
    found = {name: getattr(args, name) for name in TRAINING} | {"config": CASES[family].config}
    if arm == "selection biases":
        found["rate"] = CASES[family].rate if args.rate is None else args.rate
    return found


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Per family and arm: the worst load over seeds and layers, the losses of the seeds."""
    summary: dict[str, Any] = {}
    for result in results:
        arms = summary.setdefault(result["family"], {})
        entry = arms.setdefault(result["arm"], {"worst_max_over_mean": [], "validation_loss": []})
        for name, values in entry.items():
            values.append(result[name])
    for arms in summary.values():
        for entry in arms.values():
            losses = entry["validation_loss"]
            entry["loss_mean"] = statistics.mean(losses)
            entry["loss_spread"] = statistics.stdev(losses) if len(losses) > 1 else 0.0
        if {"auxiliary loss", "selection biases"} <= set(arms):
            ours, theirs = (arms[arm]["validation_loss"] for arm in ("selection biases", "auxiliary loss"))
            # paired: the same weights and batches at the start
            arms["selection biases"]["loss_over_auxiliary"] = statistics.mean(a - b for a, b in zip(ours, theirs))
    return summary


def table(summary: dict[str, Any]) -> Table:
    found = Table(title="Held-out text: worst max-over-mean load (per seed), loss (mean ± spread of the seeds)")
    for heading in ("model", "balanced by", "max over mean", "loss"):
        found.add_column(heading)
    for family, arms in summary.items():
        for arm, entry in arms.items():
            loads = " ".join(f"{value:.2f}" for value in entry["worst_max_over_mean"])
            found.add_row(family, arm, loads, f"{entry['loss_mean']:.4f} ± {entry['loss_spread']:.4f}")
        found.add_section()
    return found


def plot(results: list[dict[str, Any]], folder: Path) -> None:
    """Load per expert and layer over time, first seed, a picture per family: columns are layers, rows are arms."""
    from matplotlib.figure import Figure

    first = min(result["seed"] for result in results)
    chosen = [result for result in results if result["seed"] == first]
    for family in dict.fromkeys(result["family"] for result in chosen):
        rows = [result for result in chosen if result["family"] == family]
        layers = len(rows[0]["max_over_mean"])
        figure = Figure(figsize=(2.6 * layers, 1.9 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), layers, sharex=True, sharey=True, squeeze=False)
        for result, line in zip(rows, panels):
            loads = torch.tensor([entry["load"] for entry in result["history"]])  # (time, layer, expert), shares
            steps = [entry["step"] for entry in result["history"]]
            for layer, axes in enumerate(line):
                shares = loads[:, layer] * loads.shape[-1]
                image = axes.imshow(
                    shares.T.numpy(),
                    aspect="auto",
                    origin="lower",
                    extent=(steps[0], steps[-1], -0.5, loads.shape[-1] - 0.5),
                    vmin=0,
                    vmax=2,
                    cmap="RdBu_r",
                    interpolation="nearest",
                )
                if result is rows[0]:
                    axes.set_title(f"layer {layer}", fontsize=9)
                if result is rows[-1]:
                    axes.set_xlabel("step")
            line[0].set_ylabel(f"{result['arm']}\nexpert")
        figure.colorbar(image, ax=panels, label="load / mean load", shrink=0.8)
        figure.suptitle(family)
        figure.savefig(folder / f"{family}.png", dpi=110)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse([BalanceArguments], argv, prog="python -m recipes.evidence.balance.run")
    start, output = time.perf_counter(), Path(args.output_dir)
    jobs = {"/".join(map(str, key)): (args, key) for key in itertools.product(args.families, ARMS, args.seeds)}
    console = Console()
    done = run_all(
        work,
        jobs,
        output / "runs.jsonl",
        settings={name: settings(args, key) for name, (_, key) in jobs.items()},
        costs={name: 1.01 if key[1] == "selection biases" else 1.0 for name, (_, key) in jobs.items()},
        workers=args.workers,
        console=console,
    )
    results = [done[name] for name in jobs]
    summary = summarize(results)
    record = {
        "command": shlex.join(["python", "-m", "recipes.evidence.balance.run", *argv]),
        "settings": asdict(args),
        "models": {family: asdict(CASES[family]) for family in args.families},
        "summary": summary,
        "runs": [{name: value for name, value in result.items() if name != "history"} for result in results],
        "seconds": round(time.perf_counter() - start, 1),
        "hardware": hardware(),
        "versions": versions(),
    }
    (output / "balance.json").write_text(json.dumps(finite(record), indent=1) + "\n", "utf-8")
    plot(results, output)
    console.print(table(summary))
    return record


if __name__ == "__main__":
    main()
