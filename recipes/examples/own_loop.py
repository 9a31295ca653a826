"""A training loop of one's own: a base, a model four times as wide, the base's numbers, real text, a plain checkpoint.

python -m recipes.examples.own_loop --output_dir runs/own_loop        # --smallest: two steps
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, get_cosine_schedule_with_warmup

import moe_param
from moe_param.corpus import byte_windows, stdlib_split


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.examples.own_loop", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="runs/own_loop")
    parser.add_argument("--smallest", action="store_true", help="Two steps, to see that it works.")
    flags = parser.parse_args()
    steps = 2 if flags.smallest else 200
    device = torch.accelerator.current_accelerator() or torch.device("cpu")

    # 1. The base: the small model at which learning rate and all else were found. Its vocabulary is the 256 bytes.
    base = MixtralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,  # of one expert
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    )

    # 2. The target: the same model at another shape. Experts grow along with the width.
    config = moe_param.scale_config(base, width=128, expert_size=128)
    model = AutoModelForCausalLM.from_config(config).to(device)

    # 3. The rules: writes the initialization, and knows each parameter's rate. A file that `moe-param tune` wrote may
    # stand in place of `base`; then its numbers are the defaults of what follows.
    parameterization = moe_param.apply(model, base, seed=0)  # print it: a table of all rules

    # 4. AdamW with a group for each rate. The numbers are the base's.
    optimizer = parameterization.optimizer(model, lr=2**-7, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    balancer = moe_param.LoadBalancer(model, rate=0.1, inject=True)  # Mixtral's routers have no bias: it adds one

    # 5. The loop: bytes of the standard library's sources, (16, 128) a step.
    documents, held_out = ([path for _, path in side] for side in stdlib_split(0.1))
    unseen = torch.from_numpy(byte_windows(held_out, 64, 128, seed=0)).to(device)
    model.train()
    for step in range(1, steps + 1):
        ids = torch.from_numpy(byte_windows(documents, 16, 128, seed=step)).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        moe_param.clip_grad_norm_(parameterization, model, max_norm=1.0)  # a norm that means the same at every shape
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        balancer.step()
        if step % 20 == 0 or step == steps:
            busiest = max(value for name, value in balancer.metrics().items() if name.startswith("max_over_mean"))
            print(f"step {step}: loss {loss.item():.3f}, busiest expert {busiest:.2f} × its share")
    balancer.stop()

    # 6. A plain checkpoint: from_pretrained reads it. The biases that were added in 4 need one line more.
    model.eval()
    model.save_pretrained(flags.output_dir)
    again = AutoModelForCausalLM.from_pretrained(flags.output_dir, device_map=device).eval()
    moe_param.load_selection_biases(again)
    rules = moe_param.Parameterization.from_model(again).rules  # to continue: the rules came along in the config
    with torch.no_grad():
        ours, theirs = model(input_ids=unseen, labels=unseen), again(input_ids=unseen)
    print(f"held-out loss {ours.loss.item():.3f}; loaded again, with {len(rules)} rules,", end=" ")
    print(f"logits differ by at most {(ours.logits - theirs.logits).abs().max().item():.2g}")


if __name__ == "__main__":
    main()
