"""Goes on from a checkpoint that was trained under the parameterization: its rules lie in its config.

    python -m recipes.examples.continue_pretraining --output_dir runs/more --checkpoint runs/wide --lr 0.0078125
    python -m recipes.examples.continue_pretraining --output_dir runs/more --smallest     (makes a checkpoint first)

The weights are not touched; `from_model` gives the rates of every parameter, and `lr` is the base's, as before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

import moe_param
from moe_param import Parameterization
from moe_param.corpus import byte_windows, stdlib_files

BATCH, LENGTH = 8, 64


def train(model: PreTrainedModel, parameterization: Parameterization, lr: float, steps: int, seed: int) -> list[float]:
    """The loss (nats per byte) of every step on the standard library's sources."""
    optimizer = parameterization.optimizer(model, lr=lr)
    files = [path for _, path in stdlib_files()]
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:  # a warm-up: Adam's memory was not saved, and starts empty
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * min(1.0, (step + 1) / 10)
        ids = torch.from_numpy(byte_windows(files, BATCH, LENGTH, seed=seed + step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make_checkpoint(folder: Path, lr: float, steps: int) -> list[float]:
    """A byte-level Mixtral of twice its base's width, trained for a few steps."""
    base = MixtralConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_local_experts=4, num_experts_per_tok=2, intermediate_size=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(moe_param.scale_config(base, width=64))
    losses = train(model, moe_param.apply(model, base, seed=0), lr, steps, seed=0)
    model.save_pretrained(folder)
    return losses


def main(output: Path, checkpoint: Path | None, lr: float, steps: int) -> None:
    """Loads, goes on, saves."""
    if checkpoint is None:
        checkpoint = output / "start"
        losses = make_checkpoint(checkpoint, lr, steps)
        print(f"made {checkpoint}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    parameterization = Parameterization.from_model(model)
    losses = train(model, parameterization, lr, steps, seed=1_000_000)
    model.save_pretrained(output / "end")
    print(f"went on to {output / 'end'}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="trained under the parameterization; made if none is given")
    parser.add_argument("--lr", type=float, default=2**-7, help="the base's peak rate")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--smallest", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    main(options.output_dir, options.checkpoint, options.lr, 30 if options.smallest else options.steps)
