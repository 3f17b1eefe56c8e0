"""A run on the Hugging Face Hub: a commit and a tag `task-NN` per task, pushed during training; main is the newest.

The Hub itself is the record of what was pushed: a tag counts if its files equal the run's checkpoint, byte for byte,
so an interrupted push continues where it stopped, and nobody else's files are ever overwritten. No pickled files are
pushed.
"""

from hf_cdl.hub.folder import read_folder
from hf_cdl.hub.origin import Origin, read_origin
from hf_cdl.hub.push import Pusher
from hf_cdl.hub.repository import HubError, Repository

__all__ = ["HubError", "Origin", "Pusher", "Repository", "read_folder", "read_origin"]
