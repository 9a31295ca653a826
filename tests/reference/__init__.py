"""Where a reviewer begins: the parameterization as its papers write it, without this package.

1. `unfolded.py` is the whole of it in one file: a decoder with routed experts, its forward multipliers, and the tables
   of initialization, learning rate and epsilon. It imports torch and nothing of `moe_param`.
2. `test_unfolded.py` trains it beside a transformers model that `moe_param.apply` parameterized, whose forward pass has
   no multipliers. Both compute the same losses to 1e-9 for 20 steps; other parameterizations do not.
3. `multipliers.py` is the same comparison for families as transformers ships them: hooks on their own modules. The
   tests are in `tests/scaling/test_exactness.py`.
"""
