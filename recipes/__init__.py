"""Scripts and configurations around `moe_param`: run from a checkout, not part of the installed package."""
