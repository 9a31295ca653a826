"""Hyperparameters of mixture-of-experts transformers that stay put across scale (arXiv:2601.20205)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_param.experts.registration import register_experts

if TYPE_CHECKING:
    from moe_param.applying import apply, plan
    from moe_param.balancing.balancer import LoadBalancer, linear_decay
    from moe_param.balancing.callback import LoadBalancingCallback
    from moe_param.balancing.gates import RoutingError
    from moe_param.balancing.saved import load_selection_biases
    from moe_param.balancing.selection import BalanceError
    from moe_param.checks.coordinates import CoordCheck, CoordCheckError, coord_check
    from moe_param.errors import InputError, MoeParamError
    from moe_param.experts.reload import ReloadError, ReloadExpertsCallback
    from moe_param.init import WeightsError
    from moe_param.optim.adam import OptimizerError
    from moe_param.optim.clipping import ScaleFreeClipping, clip_grad_norm_
    from moe_param.optim.schedules import check_schedule
    from moe_param.parameterization import Parameterization
    from moe_param.scaling.horizon import HorizonError, HorizonFactors, horizon_factors
    from moe_param.scaling.rules import ParameterizationError, Rule
    from moe_param.scaling.spec import ScalingSpec, SpecError
    from moe_param.structure.adapters import AdapterError, register_adapter
    from moe_param.structure.observations import StructureError
    from moe_param.structure.roles import RoleError
    from moe_param.structure.scaling_config import scale_config
    from moe_param.structure.shape import Shape, ShapeError
    from moe_param.structure.suggest import BaseSuggestion, suggest_base
    from moe_param.trial import ReportError, report
    from moe_param.tuned import Tuned, TunedError, TunedNumbers, read_tuned
    from moe_param.tuning.commands import CommandRunner
    from moe_param.tuning.runners import LoopRunner
    from moe_param.tuning.transfer import transfer
    from moe_param.tuning.transfer_report import TransferReport
    from moe_param.tuning.tune import Space, tune

__version__ = "0.2.0"

# Like transformers, the package loads what is asked for when it is asked for: importing it costs next to nothing.
_NAMES = {
    "applying": ("apply", "plan"),
    "balancing.balancer": ("LoadBalancer", "linear_decay"),
    "balancing.callback": ("LoadBalancingCallback",),
    "balancing.gates": ("RoutingError",),
    "balancing.saved": ("load_selection_biases",),
    "balancing.selection": ("BalanceError",),
    "checks.coordinates": ("CoordCheck", "CoordCheckError", "coord_check"),
    "errors": ("InputError", "MoeParamError"),
    "experts.reload": ("ReloadError", "ReloadExpertsCallback"),
    "init": ("WeightsError",),
    "optim.adam": ("OptimizerError",),
    "optim.clipping": ("ScaleFreeClipping", "clip_grad_norm_"),
    "optim.schedules": ("check_schedule",),
    "parameterization": ("Parameterization",),
    "scaling.horizon": ("HorizonError", "HorizonFactors", "horizon_factors"),
    "scaling.rules": ("ParameterizationError", "Rule"),
    "scaling.spec": ("ScalingSpec", "SpecError"),
    "structure.adapters": ("AdapterError", "register_adapter"),
    "structure.roles": ("RoleError",),
    "structure.scaling_config": ("scale_config",),
    "structure.shape": ("Shape", "ShapeError"),
    "structure.suggest": ("BaseSuggestion", "suggest_base"),
    "structure.observations": ("StructureError",),
    "trial": ("ReportError", "report"),
    "tuned": ("Tuned", "TunedError", "TunedNumbers", "read_tuned"),
    "tuning.commands": ("CommandRunner",),
    "tuning.runners": ("LoopRunner",),
    "tuning.transfer": ("transfer",),
    "tuning.transfer_report": ("TransferReport",),
    "tuning.tune": ("Space", "tune"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "AdapterError",
    "BalanceError",
    "BaseSuggestion",
    "CommandRunner",
    "CoordCheck",
    "CoordCheckError",
    "HorizonError",
    "HorizonFactors",
    "InputError",
    "LoadBalancer",
    "LoadBalancingCallback",
    "LoopRunner",
    "MoeParamError",
    "OptimizerError",
    "Parameterization",
    "ParameterizationError",
    "ReloadError",
    "ReloadExpertsCallback",
    "ReportError",
    "RoleError",
    "RoutingError",
    "Rule",
    "ScaleFreeClipping",
    "ScalingSpec",
    "Shape",
    "ShapeError",
    "Space",
    "SpecError",
    "StructureError",
    "TransferReport",
    "Tuned",
    "TunedError",
    "TunedNumbers",
    "WeightsError",
    "apply",
    "check_schedule",
    "clip_grad_norm_",
    "coord_check",
    "horizon_factors",
    "linear_decay",
    "load_selection_biases",
    "plan",
    "read_tuned",
    "register_adapter",
    "report",
    "scale_config",
    "suggest_base",
    "transfer",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if not _HOME[name].startswith("tuning."):
            raise
        missing = str(error.name).partition(".")[0]
        raise ImportError(f"moe_param.{name} needs {missing}: pip install 'moe-param[tune]'") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_experts()  # "megablocks", wherever transformers takes an experts_implementation
