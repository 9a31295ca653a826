"""Pre-training, from a checkout: what `moe-param train` does, with the same arguments.

python -m recipes.pretrain recipes/configs/tiny.yaml --output_dir out
accelerate launch --config_file recipes/accelerate/cpu-2-processes.yaml -m recipes.pretrain …
"""

import sys

from moe_param.cli.main import run

if __name__ == "__main__":
    run("train", sys.argv[1:])
