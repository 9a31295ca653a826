"""Measurements of what `moe_param` costs."""
