"""The paper's own model (arXiv:2601.20205); importing this registers it with transformers as `moe_gpt`."""

from recipes.paper.modeling_moe_gpt import MoEGPTConfig, MoEGPTForCausalLM, MoEGPTModel

__all__ = ["MoEGPTConfig", "MoEGPTForCausalLM", "MoEGPTModel"]
