"""On PYTHONPATH while pip builds MegaBlocks' Python part beside a CUDA build of torch.

Why: setup.py of MegaBlocks 0.10.0 compiles its extension wherever torch finds a CUDA toolkit, and offers no way to
decline. Where that toolkit cannot be used (another major version, headers missing), the whole install would fail.
Upstream: https://github.com/databricks/megablocks/blob/v0.10.0/setup.py (`CUDA_HOME is not None`).
"""

import sys

if "_in_process" in sys.argv[0]:  # pip calls setup.py from a script of this name
    import torch.utils.cpp_extension

    torch.utils.cpp_extension.CUDA_HOME = None
