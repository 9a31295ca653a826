"""Whether and how a training run balances its experts, decided in one place for every loop that trains."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from moe_param.balancing.gates import RoutingError
from moe_param.balancing.routing import check_routed, find_routes


@dataclass(frozen=True)
class Balance:
    """What `LoadBalancer` is given. rate: 0 only counts, None does not even that. note: what the user should know."""

    rate: float | None
    inject: bool = False
    note: str = ""


def balance_of(model: PreTrainedModel, rate: float | None, inject: bool) -> Balance:
    """Balancing as asked; by default on, where the model's own routers have a selection bias.

    Raises:
        RoutingError: it was asked for, and the model is dense or routes in a way that nobody can count from outside.
    """
    asked = rate is not None or inject
    try:
        routes = find_routes(model, inject=inject)
        if not routes and not asked:
            return Balance(None)
        check_routed(model, routes)
    except RoutingError as error:
        if asked:
            raise
        return Balance(None, note=f"experts are neither counted nor balanced: {error}")
    if rate is not None:
        return Balance(rate, inject)
    if all(route.fixed for route in routes):
        return Balance(
            0.0,
            inject,
            f"the routers of {model.config.model_type} have no selection bias: training counts and logs their load and "
            "does not balance it. --inject_bias true does, with biases that the checkpoint then needs "
            "(docs/balancing.md); --balance_rate 0 says that counting is meant",
        )
    gates = [route.gate for route in routes if route.gate is not None]
    return Balance(0.1 if gates and all(gate.scores == "softmax" for gate in gates) else 0.01, inject)
