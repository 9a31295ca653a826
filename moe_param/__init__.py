"""Hyperparameters of mixture-of-experts transformers that stay put across scale (arXiv:2601.20205)."""

from moe_param.optim import OptimizerError, check_schedule
from moe_param.parameterization import Parameterization, ParameterizationError, Rule, apply, plan
from moe_param.roles import RoleError
from moe_param.shape import Shape, ShapeError, scale_config
from moe_param.spec import ScalingSpec, SpecError
from moe_param.trace import StructureError

__version__ = "0.1.0"

__all__ = [
    "OptimizerError",
    "Parameterization",
    "ParameterizationError",
    "RoleError",
    "Rule",
    "ScalingSpec",
    "Shape",
    "ShapeError",
    "SpecError",
    "StructureError",
    "apply",
    "check_schedule",
    "plan",
    "scale_config",
]
