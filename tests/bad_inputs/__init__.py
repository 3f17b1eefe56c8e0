"""A table of bad inputs of every kind; tests/test_bad_inputs.py runs it."""

from bad_inputs.changes import ROWS as CHANGES
from bad_inputs.data import ROWS as DATA
from bad_inputs.exports import ROWS as EXPORTS
from bad_inputs.files import ROWS as FILES
from bad_inputs.host import Host
from bad_inputs.hub import ROWS as HUB
from bad_inputs.images import ROWS as IMAGES
from bad_inputs.in_use import ROWS as IN_USE
from bad_inputs.models import ROWS as MODELS
from bad_inputs.recipes import ROWS as RECIPES
from bad_inputs.recommended import ROWS as RECOMMENDED
from bad_inputs.runner import Row
from bad_inputs.runs import ROWS as RUNS
from bad_inputs.trainers import ROWS as TRAINERS

ROWS = [*RECIPES, *RECOMMENDED, *FILES, *DATA, *IMAGES, *MODELS, *TRAINERS, *RUNS, *CHANGES]
ROWS += [*HUB, *IN_USE, *EXPORTS]

__all__ = ["ROWS", "Host", "Row"]
