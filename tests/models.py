"""Tiny real transformers models for the tests, and what a test needs to train them."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

import moe_param
from moe_param.structure.shape import Shape

ALL_FAMILIES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "recipes" / "evidence" / "coord_check" / "families.json").read_text()
)
"""Every family of transformers whose experts can be read: its classes and a config that trains in seconds.
`own_experts` marks those that do not use the experts interface."""

AHEAD: dict[str, dict[str, dict[str, Any]]] = json.loads((Path(__file__).parent / "families_ahead.json").read_text())
"""Facts that a reader of its code finds (see tests/test_families_ahead.py) of each family that the experts interface
does not explain, by why (`without_interface`: experts of another make; `own`: models of `tests/own_models.py`;
`encoder_decoder`; `newer`: of a later transformers). Classes and config are here where `ALL_FAMILIES` has none."""


def _config(entry: dict[str, Any], **changes: Any) -> PretrainedConfig:
    module = importlib.import_module(entry["module"])
    config_class = getattr(transformers, entry["config_class"], None) or getattr(module, entry["config_class"])
    return config_class(**{**entry["tiny_config"], **changes})


def _known(entry: dict[str, Any]) -> bool:
    """Whether the installed model takes the tiny config: in older versions layer types had other names."""
    try:
        config = _config(entry)
        with torch.device("meta"):
            return bool(getattr(importlib.import_module(entry["module"]), entry["model_class"])(config))
    except Exception:  # each family refuses in its own way
        return False


def tokens(vocab: int = 128, batch: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def runs(entry: dict[str, Any]) -> bool:
    """Whether the installed model runs by itself, and its config can be written and read: dbrx and doge of some older
    versions do not."""
    if not OLD:
        return True
    try:
        config = _config(entry)
        type(config).from_dict(config.to_dict())
        model = getattr(importlib.import_module(entry["module"]), entry["model_class"])(config)
        given = {"decoder_input_ids": tokens(100)} if config.is_encoder_decoder else {}
        return bool(model(input_ids=tokens(100), **given))
    except Exception:  # each family fails in its own way
        return False


OLD = Version(transformers.__version__) < Version("5.20")


def _installed(entry: dict[str, Any]) -> bool:
    try:
        spec = find_spec(entry["module"])
    except ModuleNotFoundError:  # its package is not there either
        return False
    own = entry.get("own_experts", False)
    found = spec is not None and (own or "@use_experts_implementation" in Path(str(spec.origin)).read_text())
    return found and (not OLD or (runs(entry) if own else _known(entry)))


INTERFACE = {name: e for name, e in ALL_FAMILIES.items() if not e.get("own_experts") and _installed(e)}
"""Those with the experts interface that the installed transformers has."""


OWN_EXPERTS = {name: e for name, e in ALL_FAMILIES.items() if e.get("own_experts") and _installed(e)} | AHEAD["own"]
"""Those whose experts only structure tells: families of the installed transformers, and models of a user's own."""

FAMILIES = INTERFACE | OWN_EXPERTS
"""Every mixture of experts that can be read here."""

_DENSE = Path(__file__).parent.parent / "recipes" / "evidence" / "coord_check" / "dense_families.json"
DENSE: dict[str, dict[str, Any]] = {
    name: entry
    for name, entry in json.loads(_DENSE.read_text()).items()
    if find_spec(entry["module"].rpartition(".")[0]) is not None
}
"""Decoder-only families without experts that the installed transformers has, in the format of `ALL_FAMILIES`."""

CORE = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "flex_olmo",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "dots1",
    "ernie4_5_moe",
    "gpt_oss",
    "granitemoe",
    "minimax_m2",
    "hunyuan_v1_moe",
    "nemotron_h",
    "jamba",
)
"""The families whose whole behaviour is tested here."""


def families(names: Iterable[str], always: Collection[str] = CORE) -> list[Any]:
    """Parameters of a test that takes seconds a family: `make test` runs it for `always`, `make test-all` for all."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.all_families) for name in names]


BYTE_MIXTRAL = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
}
"""The smallest Mixtral that trains on bytes, as the recipes' `overrides`."""


def entry_of(family: str) -> dict[str, Any]:
    """What the families files say of a family; skips the test where the installed transformers does not have it."""
    if family in ALL_FAMILIES and family not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has another {family}, or none")
    files = (*AHEAD.values(), DENSE, ALL_FAMILIES)
    return {key: value for entries in files for key, value in entries.get(family, {}).items()}


def classes(family: str) -> tuple[type[PreTrainedModel], type[PretrainedConfig]]:
    entry = entry_of(family)
    module = importlib.import_module(entry["module"])
    return getattr(module, entry["model_class"]), type(_config(entry))


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    return _config(entry_of(family), **changes)


def build(family: str, config: PretrainedConfig | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    model_class, _ = classes(family)
    torch.manual_seed(seed)
    return model_class(config if config is not None else tiny_config(family, **changes))


def initialized(family: str) -> str:
    """The family; skips the test where an old transformers leaves a matrix as it was allocated, as 5.17 ernie4_5_moe's
    router: there is no initialization to take over, and `apply` says so."""
    empty = [name for name, p in build(family).named_parameters() if p.dim() > 1 and not p.any()] if OLD else []
    if empty:
        pytest.skip(f"transformers {transformers.__version__} does not initialize {empty[0]} of {family}")
    return family


def routed(family: str) -> str:
    """The family; skips the test where an old transformers has no router module for it that gives (logits, weights,
    indices), as 5.17 for granitemoe and jamba: such routers are counted and refused, not balanced."""
    seen: list[bool] = []

    def look(module: Any, args: Any, out: Any) -> None:
        if isinstance(out, tuple) and len(out) > 2 and all(isinstance(part, torch.Tensor) for part in out[:3]):
            seen.append(out[0].is_floating_point() and out[1].shape == out[2].shape and out[2].dtype == torch.long)

    if OLD:
        model = build(family)
        for module in model.modules():
            module.register_forward_hook(look)
        model(input_ids=tokens())
        if not any(seen):
            pytest.skip(f"transformers {transformers.__version__} has another router in {family}, or none")
    return family


def inputs(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """What a forward pass over tokens is called with."""
    takes = inspect.signature(model.forward).parameters.values()
    cached = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in takes)
    return {"input_ids": ids, **({"use_cache": False} if cached else {})}


def last(model: PreTrainedModel, out: Any) -> torch.Tensor:
    """Logits, or the last hidden state of a text model without a head."""
    found: torch.Tensor = out.logits if model.get_output_embeddings() is not None else out.last_hidden_state
    return found


def output(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return last(model, model(**inputs(model, ids)))


def resized(family: str, config: PretrainedConfig, **sizes: int) -> PretrainedConfig:
    """`scale_config`; by hand for the model whose config has names of its own for its sizes."""
    if family != "own_stacked":
        return moe_param.scale_config(config, **sizes, model_class=classes(family)[0])
    names = {"width": ("n_embd", "n_head"), "depth": ("n_layer",), "num_experts": ("n_exp", "n_act")}
    names["expert_size"] = ("d_ff",)
    values = config.to_dict()
    for axis, size in sizes.items():
        first = values[names[axis][0]]
        values |= {name: values[name] * size // first for name in names[axis]}
    return type(config)(**values)


def base_of(family: str, config: PretrainedConfig, shape: Shape) -> Shape | PretrainedConfig:
    """What `apply` is given as the base: the config, where a shape is not enough (see `resized`)."""
    return config if family == "own_stacked" else shape


class KeepDouble(TorchFunctionMode):
    """Norms and routers cast to float32 by themselves; under this mode float64 stays float64, so that two ways to
    compute the same thing can be compared to 1e-9."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if double:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if "matmul" in getattr(func, "__name__", "") and any(t.dtype == torch.float64 for t in tensors):
            args = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)  # position ids × frequencies
        return func(*args, **kwargs)
