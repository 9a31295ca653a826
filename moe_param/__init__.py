"""Hyperparameters of mixture-of-experts transformers that stay put across scale (arXiv:2601.20205)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_param.registration import register_experts

if TYPE_CHECKING:
    from moe_param.balance import BalanceError, LoadBalancer, LoadBalancingCallback, linear_decay
    from moe_param.clipping import ScaleFreeClipping, clip_grad_norm_
    from moe_param.coordinates import CoordCheck, CoordCheckError, coord_check
    from moe_param.horizon import HorizonError, HorizonFactors, horizon_factors
    from moe_param.init import WeightsError
    from moe_param.optim import OptimizerError, check_schedule
    from moe_param.parameterization import Parameterization, apply, plan
    from moe_param.roles import RoleError
    from moe_param.routing import RoutingError
    from moe_param.rules import ParameterizationError, Rule
    from moe_param.shape import Shape, ShapeError, scale_config
    from moe_param.spec import ScalingSpec, SpecError
    from moe_param.trace import StructureError
    from moe_param.tuned import Tuned, TunedError, read_tuned

__version__ = "0.1.0"

# Like transformers, the package loads what is asked for when it is asked for: importing it costs next to nothing.
_NAMES = {
    "balance": ("BalanceError", "LoadBalancer", "LoadBalancingCallback", "linear_decay"),
    "clipping": ("ScaleFreeClipping", "clip_grad_norm_"),
    "coordinates": ("CoordCheck", "CoordCheckError", "coord_check"),
    "horizon": ("HorizonError", "HorizonFactors", "horizon_factors"),
    "init": ("WeightsError",),
    "optim": ("OptimizerError", "check_schedule"),
    "parameterization": ("Parameterization", "apply", "plan"),
    "roles": ("RoleError",),
    "rules": ("ParameterizationError", "Rule"),
    "routing": ("RoutingError",),
    "shape": ("Shape", "ShapeError", "scale_config"),
    "spec": ("ScalingSpec", "SpecError"),
    "trace": ("StructureError",),
    "tuned": ("Tuned", "TunedError", "read_tuned"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "BalanceError",
    "CoordCheck",
    "CoordCheckError",
    "HorizonError",
    "HorizonFactors",
    "LoadBalancer",
    "LoadBalancingCallback",
    "OptimizerError",
    "Parameterization",
    "ParameterizationError",
    "RoleError",
    "RoutingError",
    "Rule",
    "ScaleFreeClipping",
    "ScalingSpec",
    "Shape",
    "ShapeError",
    "SpecError",
    "StructureError",
    "Tuned",
    "TunedError",
    "WeightsError",
    "apply",
    "check_schedule",
    "clip_grad_norm_",
    "coord_check",
    "horizon_factors",
    "linear_decay",
    "plan",
    "read_tuned",
    "scale_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_experts()  # "megablocks", wherever transformers takes an experts_implementation
