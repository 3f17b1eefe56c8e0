"""accelerate launch recipes/train.py [RECIPE.yaml ...] [--any.field value ...]     (default: recipes/quickstart.yaml)

The same as hf-cdl train.
"""

import sys
from pathlib import Path

from hf_cdl_command import start

if __name__ == "__main__":
    start("train", sys.argv[1:], default=Path(__file__).with_name("quickstart.yaml"))
