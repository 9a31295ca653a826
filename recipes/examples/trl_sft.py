"""Supervised fine-tuning with TRL: a parameterized model whose experts stay balanced, saved and loaded again.

    python -m recipes.examples.trl_sft --output_dir runs/sft          # --smallest: two steps

Needs trl and moe-param[train]. Everything is local: a tiny model, a tokenizer of single bytes, and questions about the
standard library whose answers are its docstrings.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import random
import statistics
import string

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig
from trl import SFTConfig, SFTTrainer

import moe_param

EOS, PAD = "<|eos|>", "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, an end and a filler: 258 ids."""
    vocabulary = {character: i for i, character in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), EOS, PAD])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def questions() -> Dataset:
    """Prompts and completions: what does a function of the standard library do?"""
    rows = []
    for module in (json, math, random, statistics, string):
        for name, thing in inspect.getmembers(module, callable):
            if not name.startswith("_") and (answer := inspect.getdoc(thing)):
                question = f"What does {module.__name__}.{name} do?\n"
                rows.append({"prompt": question, "completion": answer.splitlines()[0]})
    return Dataset.from_list(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.examples.trl_sft", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="runs/sft")
    parser.add_argument("--smallest", action="store_true", help="Two steps, to see that it works.")
    flags = parser.parse_args()

    # 1. A model, and the rules that carry a base's learning rate to its size. The base is half as wide and deep here.
    # For a checkpoint that was trained so: from_pretrained, then moe_param.Parameterization.from_model(model).
    tokenizer = byte_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    base = moe_param.Shape.from_config(moe_param.scale_config(config, width=32, depth=2, expert_size=16))
    parameterization = moe_param.apply(model, base, seed=0)

    # 2. TRL. It turns the auxiliary loss of MoE models on; `balance` balances instead, so that is set to zero.
    # Qwen's routers have no selection bias: inject=True gives them one, which the saved model then has.
    args = SFTConfig(
        output_dir=flags.output_dir,
        max_steps=2 if flags.smallest else 200,
        per_device_train_batch_size=8,
        max_length=128,
        learning_rate=2**-7,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0 if flags.smallest else 20,
        max_grad_norm=0.0,
        logging_steps=1 if flags.smallest else 20,
        router_aux_loss_coef=0.0,
        bf16=False,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=questions(),
        processing_class=tokenizer,
        **parameterization.trainer_arguments(args, balance={"rate": 0.1, "inject": True}),
    )
    trainer.train()

    # 3. One save has all of it: weights, rules (in the config), selection biases. Loading them takes its own line.
    trainer.save_model(flags.output_dir)
    trainer.accelerator.wait_for_everyone()
    loaded = AutoModelForCausalLM.from_pretrained(flags.output_dir, device_map=model.device)
    moe_param.load_selection_biases(loaded)
    rules = moe_param.Parameterization.from_model(loaded)

    prompt = tokenizer("What does math.sqrt do?\n", return_tensors="pt").to(model.device)
    with torch.no_grad():
        difference = model.eval()(**prompt).logits - loaded(**prompt).logits
    if trainer.is_world_process_zero():
        print(f"loaded again: logits differ by at most {difference.abs().max():.1e}, {len(rules.rules)} rules read")


if __name__ == "__main__":
    main()
