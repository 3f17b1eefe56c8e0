"""A run on the Hugging Face Hub: a commit and a tag `task-NN` per task, pushed beside training; main is the newest.

What the Hub holds is the truth about what was pushed: a tag counts if its files are the run's checkpoint, byte for
byte, so a push that was cut off goes on where it stopped, and nobody else's files are ever overwritten. Only files
that hold no code to unpickle are pushed.
"""

from hf_cdl.hub.folder import read_folder
from hf_cdl.hub.origin import Origin, read_origin
from hf_cdl.hub.push import Pusher
from hf_cdl.hub.repository import HubError, Repository

__all__ = ["HubError", "Origin", "Pusher", "Repository", "read_folder", "read_origin"]
