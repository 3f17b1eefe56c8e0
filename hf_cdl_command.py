"""Where a command starts: the script hf-cdl and recipes/train.py.

This lies beside the package, because whatever is imported from hf_cdl imports transformers and torch first, which
takes seconds. A command listens to Ctrl-C and reads its words before that: hf_cdl/__init__.py sees that it was
started here.
"""

from hf_cdl.commands import stopping
from hf_cdl.commands.main import main, start

__all__ = ["main", "start", "stopping"]
