"""`moe-param train` for launchers that start a module: `accelerate launch -m moe_param.train CONFIG.yaml …`."""

import sys

from moe_param.cli.main import run

if __name__ == "__main__":
    run("train", sys.argv[1:])
