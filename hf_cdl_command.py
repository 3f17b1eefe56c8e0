"""Entry point of the commands: the script hf-cdl and recipes/train.py.

This module is outside the package because importing anything from hf_cdl first imports transformers and torch, which
takes seconds. A command handles Ctrl-C and parses its arguments before that: hf_cdl/__init__.py detects that it was
started from here.
"""

from hf_cdl.commands import stopping
from hf_cdl.commands.main import main, start

__all__ = ["main", "start", "stopping"]
