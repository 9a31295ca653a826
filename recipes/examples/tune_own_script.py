"""Your own training script, tuned: it applies the trial's file with one line and reports its loss with another.

    moe-param tune recipes/configs/tiny.yaml --output_dir runs/own --command \\
        "accelerate launch -m recipes.examples.tune_own_script --tuned {trial} --seed {seed}"

The file that the search leaves is of the same kind: `--tuned runs/own/tuned.yaml` trains with what was found.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

import moe_param
from moe_param.corpus import byte_windows, stdlib_split
from moe_param.training.processes import shutdown


def train(tuned: str, seed: int, steps: int) -> None:
    """A byte-level model on the sources of the standard library."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = AutoModelForCausalLM.from_config(moe_param.read_tuned(tuned).target)  # or a model of your own
    parameterization = moe_param.apply(model, tuned, seed=seed)  # 1. the numbers that this run tries
    optimizer = parameterization.optimizer(model)  # the learning rate too, Adam's betas, ε and weight decay
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 4, steps)
    model, optimizer = accelerator.prepare(model, optimizer)

    documents, held_out = ([path for _, path in side] for side in stdlib_split(0.1))
    batch = 16 // accelerator.num_processes
    for step in range(1, steps + 1):
        windows = byte_windows(
            documents, 16, 64, seed=seed * 1_000_003 + step
        )  # the same for every number that is tried
        ids = torch.from_numpy(windows[accelerator.process_index * batch :][:batch]).to(accelerator.device)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // 20) == 0:
            mean = accelerator.reduce(loss.detach(), "mean")
            if not moe_param.report(
                mean, step=step, steps=steps
            ):  # 2. in every process; False: the search has seen enough
                return

    model.eval()
    with torch.no_grad():
        ids = torch.from_numpy(byte_windows(held_out, 64, 64, seed=0)).to(accelerator.device)
        loss = model(input_ids=ids, labels=ids).loss
    moe_param.report(loss)  # 3. what the run came to
    accelerator.print(f"held-out loss {loss.item():.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", required=True, help="the trial's file, or what `moe-param tune` found")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--smallest", action="store_true", help="two steps, to see that it works")
    options = parser.parse_args()
    train(options.tuned, options.seed, 2 if options.smallest else options.steps)
    shutdown()
