"""The same as hf-cdl train, for accelerate launch; without a recipe recipes/quickstart.yaml.

accelerate launch --config_file recipes/accelerate/one.yaml recipes/train.py [RECIPE.yaml ...] [--any.field value ...]
"""

import sys
from pathlib import Path

from hf_cdl_command import start

if __name__ == "__main__":
    start("train", sys.argv[1:], default=Path(__file__).with_name("quickstart.yaml"))
