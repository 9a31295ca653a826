"""The recipes, run for real at their smallest: what they write, resuming, and errors in one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, MixtralConfig, get_scheduler

import moe_param
from moe_param import RoutingError
from moe_param.cli.main import run as command_line
from moe_param.errors import InputError, MoeParamError
from moe_param.training import pretrain
from moe_param.training.arguments import Horizon, set_horizon
from moe_param.training.balance import balance_of
from moe_param.training.report import MetricsFile, flops_per_token, read_lines
from moe_param.tuning.short_run import ShortRun, short_run, train
from tests.models import BYTE_MIXTRAL, tiny_config

TINY = str(Path(__file__).parents[2] / "recipes" / "configs" / "tiny.yaml")


def run(output: Path, *extra: str, steps: int = 24, start: Callable[..., Any] = pretrain.main) -> dict[str, Any]:
    """`tiny.yaml` made tinier: JSON on the command line takes the place of the file's mapping."""
    arguments = {
        "overrides": json.dumps(BYTE_MIXTRAL),
        "shape": "width=32",
        "seq_len": 32,
        "validation_blocks": 8,
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "warmup_steps": 4,
        "lr_scheduler_type": "constant_with_warmup",
        "logging_steps": 4,
        "eval_steps": 8,
        "save_steps": 8,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    return start(["--config", TINY, "--output_dir", str(output), *flags, *extra])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run slower on many threads, and exact repetition needs one count throughout."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


# -- pretrain --------------------------------------------------------------------------------------------------------
def test_pretrain_learns_and_leaves_its_files(whole_run: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole_run
    lines = read_lines(folder / MetricsFile.name)
    losses = [line["loss"] for line in lines if "loss" in line]
    validation = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.5 and abs(losses[0] - math.log(256)) < 0.5
    assert [step for step, _ in validation] == [8, 16, 24]
    assert lines[0]["tokens"] == 4 * 4 * 32
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["validation_loss"] == validation[-1][1]
    assert summary["parameters"] > summary["active_parameters"] > 0
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-16", "checkpoint-24"}


def groups_of(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str, steps: int) -> list[dict[str, Any]]:
    """The optimizer's groups in a run; `initial_lr` is the rate before the schedule."""
    found: list[dict[str, Any]] = []

    class Watching(MetricsFile):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            found.extend(kwargs["optimizer"].param_groups)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "MetricsFile", Watching)
        run(folder, *flags, steps=steps)
    return found


def test_pretrain_uses_the_rules(
    whole_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole_run[0])
    parameterization = moe_param.Parameterization.from_model(model)
    assert (parameterization.base_shape.width, parameterization.shape.width) == (16, 32)
    groups = groups_of(monkeypatch, tmp_path, steps=2)
    wanted = parameterization.param_groups(model, lr=2**-7, eps=1e-12)
    assert len(wanted) > 1
    for group, saved in zip(wanted, groups, strict=True):
        assert (saved["names"], saved["initial_lr"], saved["eps"]) == (group["names"], group["lr"], group["eps"])
        assert (saved["betas"], saved["weight_decay"]) == ((0.9, 0.95), 0.0)


def test_resumed_run_ends_exactly_like_a_whole_one(
    whole_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    class DiesAt13(MetricsFile):  # between checkpoints, so that steps are computed twice
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 13:
                raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pretrain, "MetricsFile", DiesAt13)
        run(tmp_path)
    assert read_lines(tmp_path / MetricsFile.name)[-1]["step"] == 12
    summary = run(tmp_path, "--resume")
    assert summary["resumed_from"].endswith("checkpoint-8")

    def timeless(folder: Path) -> list[dict[str, Any]]:
        kept = ("step", "tokens", "loss", "eval_loss", "grad_norm", "learning_rate")
        lines = [{k: line[k] for k in kept if k in line} for line in read_lines(folder / MetricsFile.name)]
        return [line for line in lines if len(line) > 2]

    whole, whole_summary = whole_run
    assert summary["validation_loss"] == whole_summary["validation_loss"]
    assert timeless(tmp_path) == timeless(whole)  # every step once, and the same to the last bit


def test_a_second_run_in_the_same_folder_is_refused(whole_run: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="holds a run already: --resume"):
        run(whole_run[0])


def test_torn_last_line_of_metrics_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 1}]


@pytest.mark.parametrize(
    ("yaml", "error", "message"),
    [
        ("learning_rte: 1e-3\n", InputError, r"unknown key 'learning_rte' \(did you mean 'learning_rate'"),
        ("- a\n", moe_param.TunedError, "expected a mapping"),
        ("a: [\n", moe_param.TunedError, "not YAML"),
    ],
)
def test_wrong_yaml(tmp_path: Path, yaml: str, error: type[Exception], message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml)
    with pytest.raises(error, match=message) as raised:
        pretrain.parse(["--config", str(path)])
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (
            ["--overrides", json.dumps(BYTE_MIXTRAL | {"vocab_size": 100})],
            InputError,
            "256 ids, the model 100: set overrides.vocab_size",
        ),
        (["--overrides", "{hidden: 1}"], InputError, "not JSON"),
        (["--overrides", '{"hiden_size": 1}'], moe_param.TunedError, "have no hiden_size"),
        (["--shape", '{"wide": 1}'], moe_param.TunedError, "shape: unknown size 'wide' .did you mean 'width'"),
        (["--shape", '{"width": 17}'], moe_param.ShapeError, "width"),
        (["--model_type", "mixtrall"], moe_param.TunedError, "no config for 'mixtrall'"),
        (["--model", "some/id", "--model_type", "mixtral"], InputError, "set one of model"),
        (["--spec", "moe-complete"], moe_param.SpecError, "moe-completep"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], moe_param.OptimizerError, "reduce_lr_on_plateau"),
        (["--optim", "sgd"], InputError, "AdamW only"),
    ],
)
def test_wrong_arguments(tmp_path: Path, flags: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path, *flags)
    assert issubclass(error, MoeParamError)  # told without a traceback


SIZES = {"width": 16, "depth": 1, "num_experts": 4, "top_k": 2, "expert_size": 16}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_files", "{tmp}/empty.jsonl"], "empty.jsonl: no text in it"),
        (["--train_files", "{tmp}/text.jsonl", "--text_column", "body"], r"no column 'body' \(it has: text\)"),
        (["--shape", "num_experts=8,top_k=2"], r"sparsity"),
        (["--shape", "num_experts=8,top_k=2", "--train_files", "nowhere.txt"], r"sparsity"),  # before the text is read
        (
            ["--tuned_at", json.dumps(SIZES | {"width": 64, "depth": 3})],
            "another base .*width 64, not 16; depth 3, not 1",
        ),
        (["--tuned_at", '{"width": 16}'], "tuned_at: .*depth not named"),
        (["--tokens", "1000", "--max_steps", "10"], "tokens and max_steps are both set"),
        (["--tokens", "0", "--max_steps", "-1"], "tokens is 0.0: expected a positive number"),
        (["--batch_tokens", "100"], "batch_tokens is 100: not a multiple of seq_len 32 × 1 processes; 96 would be"),
        (["--nan", "ignore"], "nan is 'ignore': expected one of stop, skip"),
        (["--balance_rule", "fair"], "balance_rule is 'fair'"),
        (["--decay_tokens", "10"], "decay_tokens is for lr_scheduler_type wsd"),
        (["--lr_scheduler_type", "cosin"], "cosin"),
        (["--clip", "1", "--max_grad_norm", "1"], "max_grad_norm"),
        (["--decay", "ema", "--weight_decay", "0.1"], "base_steps"),
        (["--load_best_model_at_end", "true", "--save_steps", "8"], "would lose the experts"),
    ],
)
def test_bad_input_is_one_line_for_the_shell(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' * 400)
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    with pytest.raises(SystemExit) as raised:  # and not the error itself, which would be a traceback
        run(tmp_path / "out", *flags, start=lambda argv: command_line("train", argv))
    lines = capsys.readouterr().err.strip().splitlines()
    assert raised.value.code == 2 and lines[-1].startswith("moe-param train: error: ")
    assert re.search(message, lines[-1]), lines


def test_hyperparameters_of_this_base_are_taken(tmp_path: Path) -> None:
    model, _, _ = pretrain.parse(
        ["--config", TINY, "--overrides", json.dumps(BYTE_MIXTRAL), "--tuned_at", json.dumps(SIZES)]
    )
    base, target = pretrain.build_configs(model)
    assert base.hidden_size == target.hidden_size == 16


# -- horizon ---------------------------------------------------------------------------------------------------------
def horizon(*flags: str, processes: int = 1) -> tuple[Any, Any]:
    _, data, args = pretrain.parse(["--model_type", "mixtral", "--use_cpu", "--seq_len", "64", *flags])
    return set_horizon(args, data.seq_len, processes), args


@pytest.mark.parametrize(
    ("per_device", "processes", "micro", "accumulation"), [(8, 1, 8, 8), (8, 4, 8, 2), (6, 1, 4, 16), (64, 16, 4, 1)]
)
def test_a_batch_in_tokens_is_the_same_on_any_number_of_processes(
    per_device: int, processes: int, micro: int, accumulation: int
) -> None:
    flags = ["--tokens", "1e6", "--batch_tokens", "4096", "--per_device_train_batch_size", str(per_device)]
    found, args = horizon(*flags, "--warmup_tokens", "40960", processes=processes)
    assert found == Horizon(batch=64, micro=micro, steps=244, seq_len=64) and found.tokens_per_step == 4096
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (micro, accumulation)
    assert (args.max_steps, args.get_warmup_steps(args.max_steps)) == (244, 10)


def test_a_unit_on_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("max_steps: 7\nwarmup_tokens: 9\nmodel_type: mixtral\n")
    _, _, args = pretrain.parse(["--config", str(tmp_path / "a.yaml"), "--tokens", "1e5", "--warmup_steps=3"])
    assert (args.tokens, args.max_steps, args.warmup_tokens, args.warmup_steps) == (1e5, -1, None, 3)


def rates(*flags: str) -> list[float]:
    _, args = horizon("--max_steps", "100", "--batch_tokens", "512", *flags)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(100),
        num_training_steps=100,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    found = []
    for _ in range(101):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_schedules() -> None:
    warmup = ["--warmup_tokens", str(10 * 512)]
    constant = rates("--lr_scheduler_type", "constant", *warmup)
    assert constant == pytest.approx([min(1, step / 10) for step in range(101)])  # the warm-up is not dropped
    cosine = rates("--lr_scheduler_type", "cosine", *warmup)
    assert cosine[10:] == pytest.approx([(1 + math.cos(math.pi * i / 90)) / 2 for i in range(91)])
    wsd = rates("--lr_scheduler_type", "wsd", "--decay_tokens", str(40 * 512), *warmup)
    assert wsd == pytest.approx([min(1, step / 10, (100 - step) / 40) for step in range(101)])
    default = rates("--lr_scheduler_type", "wsd", *warmup)
    assert default == pytest.approx([min(1, step / 10, (100 - step) / 20) for step in range(101)])


def test_shapes_as_pairs_and_as_json() -> None:
    for text in ("width=32,expert_size=8", '{"width": 32, "expert_size": 8}'):
        for name in ("shape", "target_shape"):
            model, _, _ = pretrain.parse(["--model_type", "mixtral", "--use_cpu", f"--{name}", text])
            assert model.shape == {"width": 32, "expert_size": 8}
    with pytest.raises(InputError, match="two names of one thing"):
        pretrain.parse(["--model_type", "mixtral", "--shape", "width=32", "--target_shape", "width=32"])


# -- what a run reports ----------------------------------------------------------------------------------------------
def test_balancing_is_on_where_the_family_has_a_bias(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its numbers are in metrics.jsonl and in TensorBoard, with speed; the model comes from a folder."""
    tiny_config("glm4_moe", vocab_size=256).save_pretrained(tmp_path / "config")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    flags = ["--model", str(tmp_path / "config"), "--overrides", "{}", "--report_to", "tensorboard"]
    run(tmp_path / "out", *flags, "--shape", "{}", "--peak_tflops", "0.1", steps=8)
    assert "no selection bias" not in caplog.text
    lines = [line for line in read_lines(tmp_path / "out" / MetricsFile.name) if "loss" in line]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    biases = [value for name, value in model.named_buffers() if "correction_bias" in name]
    ranges = [float(bias.max() - bias.min()) for bias in biases]
    assert biases and max(ranges) == pytest.approx(lines[-1]["moe/bias_range"]) and max(ranges) > 0
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.1)
        assert line["tokens_per_second"] > 0
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    for name in ("moe/max_over_mean", "moe/bias_range", "tokens_per_second", "mfu", "loss"):
        points = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert points == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def test_without_a_bias_it_counts_says_so_once_and_names_the_flag(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "counted", steps=4)
    assert caplog.text.count("no selection bias") == caplog.text.count("--inject_bias") == 1
    counted = read_lines(tmp_path / "counted" / MetricsFile.name)[0]
    assert counted["moe/max_over_mean"] >= 1 and counted["moe/bias_range"] == 0
    caplog.clear()
    run(tmp_path / "silent", "--balance_rate", "0", steps=4)
    run(tmp_path / "injected", "--inject_bias", "true", steps=4)
    assert "no selection bias" not in caplog.text
    assert read_lines(tmp_path / "silent" / MetricsFile.name)[0]["loss"] == counted["loss"]
    assert read_lines(tmp_path / "injected" / MetricsFile.name)[0]["moe/bias_range"] > 0
    for folder in ("injected", "injected/checkpoint-4"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        moe_param.load_selection_biases(model)
        assert any(bias.any() for name, bias in model.named_buffers() if "selection" in name)


def test_flops_of_a_token_counted_by_hand() -> None:
    model, _, _ = pretrain.parse(["--config", TINY, "--overrides", json.dumps(BYTE_MIXTRAL), "--use_cpu"])
    base, target = pretrain.build_configs(model)
    plan = moe_param.plan(type(AutoModelForCausalLM.from_config(target)), target, base)
    attention, experts, router, head, norms = 4 * 16 * 16, 2 * 3 * 16 * 16, 4 * 16, 256 * 16, 3 * 16
    weights = attention + experts + router + head + norms
    products = 16 * 10  # heads × head_dim × seq_len; 2 products × 2 FLOPs × 3 passes / 2 (causal) of it
    assert flops_per_token(plan, 10, tied=False) == 6 * weights + 6 * products


# -- Trainer's own flags ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("plain"))


def losses(folder: Path, *flags: str) -> list[float]:
    run(folder, "--batch_tokens", "256", "--logging_steps", "1", "--inject_bias", "true", *flags, steps=4)
    return [line["loss"] for line in read_lines(folder / MetricsFile.name) if "loss" in line]


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--per_device_train_batch_size", "8"], 1e-6),  # accumulation over two against one pass
        (["--gradient_checkpointing", "true"], 1e-6),
        (["--experts_implementation", "eager"], 1e-6),
        (["--torch_compile", "true", "--torch_compile_backend", "aot_eager"], 1e-5),
        (["--dataloader_num_workers", "1"], 0),
        (["--bf16", "true"], 1e-2),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_trainers_flags_change_speed_and_not_losses(
    tmp_path: Path, plain_losses: list[float], flags: list[str], tolerance: float
) -> None:
    found = losses(tmp_path, *flags)
    assert found == pytest.approx(plain_losses, rel=tolerance, abs=0)
    if flags[0] == "--bf16":
        assert found != pytest.approx(plain_losses, rel=1e-6, abs=0)


def test_flags_of_decay_and_horizon_reach_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [
        "--weight_decay",
        "0.1",
        "--decay",
        "ema",
        "--base_steps",
        "2",
        "--batch_ratio",
        "4",
        "--tokens_ratio",
        "8",
        "--tokens_exponent",
        "0.25",
    ]
    groups = groups_of(monkeypatch, tmp_path, *flags, "--clip", "0.5", "--logging_steps", "1", steps=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = moe_param.Parameterization.from_model(model).param_groups(
        model,
        lr=2**-7,
        eps=1e-12,
        weight_decay=0.1,
        decay="ema",
        steps=4,
        base_steps=2,
        batch_ratio=4.0,
        tokens_ratio=8.0,
        tokens_exponent=0.25,
        betas=(0.9, 0.95),
    )
    assert [group["initial_lr"] for group in groups] == [group["lr"] for group in wanted]
    for key in ("names", "eps", "weight_decay", "betas"):
        assert [group[key] for group in groups] == [group[key] for group in wanted], key
    line = read_lines(tmp_path / MetricsFile.name)[-3]
    assert line["scale_free_grad_norm"] > 0.5


def test_unknown_argument_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'--learning_rte' \(did you mean '--learning_rate'"):
        run(tmp_path, "--learning_rte", "1")


def test_command_line_overrides_yaml_and_clipping_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, data, args = pretrain.parse(["--config", TINY, "--seq_len", "64", "--output_dir", str(tmp_path)])
    assert (model.model_type, data.seq_len, args.learning_rate, args.max_grad_norm) == ("mixtral", 64, 2**-7, 0.0)
    pretrain.check(args)
    assert "max_grad_norm" not in caplog.text
    args.max_grad_norm = 1.0
    pretrain.check(args)
    assert caplog.text.count("does not transfer") == 1


@pytest.mark.parametrize("path", sorted(Path(TINY).parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse_and_plan(path: Path) -> None:
    model, _, _ = pretrain.parse(["--config", str(path), "--use_cpu", "--bf16", "false"])
    base, target = pretrain.build_configs(model)
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(target))
    assert moe_param.plan(model_class, target, base, spec=model.spec).rules


# -- the short loop -------------------------------------------------------------------------------------------------
def short(lr: float, **changes: Any) -> ShortRun:
    base = MixtralConfig(**BYTE_MIXTRAL)
    config = moe_param.scale_config(base, width=32)
    settings: dict[str, Any] = {"steps": 6, "batch_size": 4, "seq_len": 32, "validation_blocks": 8, **changes}
    return ShortRun(config.to_dict(), base.to_dict(), "moe-completep", lr, **settings)


def test_short_run_is_reproducible_and_divergence_is_a_result() -> None:
    first, second = train(short(2**-7)), train(short(2**-7))
    assert first.validation_loss == second.validation_loss < math.log(256)
    assert train(short(2**-7, schedule="constant_with_warmup")).validation_loss != first.validation_loss
    gone = train(short(1e30, warmup=0.0))
    assert gone.diverged and gone.validation_loss == math.inf


@pytest.mark.parametrize(
    "change",
    [
        *({"max_grad_norm": 1.0}, {"clip": 1.0}, {"batch_ratio": 2.0}, {"tokens_ratio": 2.0}),
        {"decay": "ema", "base_steps": 7, "weight_decay": 0.1},
        {"decay": "none", "weight_decay": 0.1},
    ],
)
def test_short_runs_refuse_what_they_do_not_do(tmp_path: Path, change: dict[str, Any]) -> None:
    flags = [f"--{name}={value}" for name, value in change.items()]
    arguments = pretrain.parse(["--config", TINY, "--output_dir", str(tmp_path), *flags])
    with pytest.raises(InputError, match=next(iter(change))):
        short_run(*arguments, MixtralConfig(**BYTE_MIXTRAL))


def test_a_family_that_routes_by_itself_is_trained_unbalanced_unless_asked() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("dbrx"))
    found = balance_of(model, None, False)
    assert found.rate is None and "neither counted nor balanced" in found.note
    for rate, inject in ((0.0, False), (None, True)):
        with pytest.raises(RoutingError, match="from its block"):
            balance_of(model, rate, inject)
