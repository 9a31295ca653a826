"""A loop of your own under accelerate: weights, gradients and Adam's state sharded over the processes (FSDP2).

    accelerate launch --config_file recipes/accelerate/cpu-2-processes-fsdp2.yaml \\
        -m recipes.examples.accelerate_fsdp2 --output_dir runs/fsdp2 --smallest

The rules are applied, and the optimizer's groups are made, before `prepare` shards anything: everything goes by
parameter name. What is saved is a plain checkpoint.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator, PartialState
from transformers import AutoModelForCausalLM, MixtralConfig

import moe_param
from moe_param.corpus import byte_windows, stdlib_files
from moe_param.training.processes import shutdown
from moe_param.training.trainer import allow_fsdp_on_cpu


def train(output_dir: str, steps: int) -> None:
    """Trains a byte-level Mixtral of twice its base's width, saves it, and compares it to what is loaded again."""
    PartialState(cpu=not torch.accelerator.is_available())
    allow_fsdp_on_cpu()  # there, accelerate would train with DDP without a word
    accelerator = Accelerator()

    base = MixtralConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_local_experts=4, num_experts_per_tok=2, intermediate_size=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(moe_param.scale_config(base, width=64))
    parameterization = moe_param.apply(model, base, seed=0)
    optimizer = parameterization.optimizer(model, lr=2**-7)
    model, optimizer = accelerator.prepare(model, optimizer)

    files = [path for _, path in stdlib_files()]
    for step in range(steps):
        windows = byte_windows(files, 8, 64, seed=step * accelerator.num_processes + accelerator.process_index)
        ids = torch.from_numpy(windows).to(accelerator.device)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean").item()
        accelerator.print(f"step {step + 1}: loss {mean:.3f}")

    state = accelerator.get_state_dict(model)  # gathered: every process takes part
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[:1]).logits
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output_dir, state_dict=state)
        again = AutoModelForCausalLM.from_pretrained(output_dir).to(accelerator.device).eval()
        with torch.no_grad():
            difference = (again(input_ids=ids[:1]).logits - logits).abs().max().item()
        rules = len(moe_param.Parameterization.from_model(again).rules)
        sharded = sum(hasattr(p, "device_mesh") for p in model.parameters())
        print(f"{sharded} sharded parameters, logits differ by at most {difference:.1e}, {rules} rules")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--smallest", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    train(options.output_dir, 6 if options.smallest else options.steps)
    shutdown()
