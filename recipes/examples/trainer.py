"""transformers' own Trainer, with the rules: balanced, clipped, saved, resumed, its best model loaded at the end.

    python -m recipes.examples.trainer --output_dir runs/trainer        # --smallest: four steps
    python -m recipes.examples.trainer --output_dir runs/trainer --resume_from_checkpoint runs/trainer/checkpoint-100

Every flag of TrainingArguments works; those that the rules rule out say so.
"""

import sys
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, MixtralConfig, Trainer, TrainingArguments

import moe_param
from moe_param.corpus import byte_windows, stdlib_split


@dataclass
class Arguments(TrainingArguments):
    output_dir: str | None = field(default="runs/trainer")
    learning_rate: float = field(default=2**-7, metadata={"help": "The base's."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Must be 0: that norm changes with the shape."})
    max_steps: int = 200
    per_device_train_batch_size: int = 16
    eval_strategy: str = "steps"
    eval_steps: float | None = 100
    save_steps: float = 100
    logging_steps: float = 20
    warmup_steps: float = 20
    load_best_model_at_end: bool = True
    report_to: str = "none"
    smallest: bool = field(default=False, metadata={"help": "Four steps, to see that it works."})


def rows(side: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Windows of 128 bytes of the standard library's sources; side 0 is for training, 1 is held out."""
    windows = torch.from_numpy(byte_windows([path for _, path in stdlib_split(0.1)[side]], count, 128, seed=side))
    return [{"input_ids": window, "labels": window} for window in windows]


def main() -> None:
    parser = HfArgumentParser(Arguments, prog="python -m recipes.examples.trainer")  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses()
    if args.smallest:
        args.max_steps, args.warmup_steps, args.eval_steps, args.save_steps, args.logging_steps = 4, 0, 2, 2, 1

    # 1. Base, target, rules: as in own_loop.py.
    base = MixtralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(moe_param.scale_config(base, width=128, expert_size=128))
    parameterization = moe_param.apply(model, base, seed=0)

    # 2. The Trainer. trainer_arguments gives it the optimizer and callbacks that clip, balance and load whole experts.
    # lr= says that the default above is meant; from a file that `moe-param tune` wrote, the rate comes by itself.
    trainer = Trainer(
        model,
        args,
        train_dataset=rows(0, args.max_steps * args.train_batch_size),
        eval_dataset=rows(1, 64),
        **parameterization.trainer_arguments(
            args, lr=args.learning_rate, clip=1.0, balance={"rate": 0.1, "inject": True}
        ),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()

    # 3. What was saved is a plain checkpoint, and the biases that balancing added are put back by one line.
    again = AutoModelForCausalLM.from_pretrained(args.output_dir, device_map=args.device).eval()
    moe_param.load_selection_biases(again)
    ids = torch.stack([row["input_ids"] for row in rows(1, 4)]).to(again.device)
    with torch.no_grad():
        difference = (model.eval()(input_ids=ids).logits - again(input_ids=ids).logits).abs().max().item()
    print(
        f"held-out loss {trainer.evaluate()['eval_loss']:.3f}; loaded again, logits differ by at most {difference:.2g}"
    )


if __name__ == "__main__":
    try:
        main()
    except moe_param.MoeParamError as error:
        sys.exit(f"error: {error}")
