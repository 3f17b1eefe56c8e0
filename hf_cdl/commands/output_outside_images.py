"""What a run writes lies apart from the images that it reads, or it would be read as images the next time."""

from __future__ import annotations

from pathlib import Path

from hf_cdl.data.folders import is_among_images
from hf_cdl.escape import visible
from hf_cdl.recipe import Recipe, RecipeError


def check_apart(recipe: Recipe) -> None:
    """Raise RecipeError if the run's folder or its cache would lie among the images of a local folder."""
    data = recipe.data
    named = [name for name in (data.train_split, data.validation_split, data.test_split) if name]
    read = {"path": data.path, "unlabelled": data.unlabelled, "foreign": data.foreign}
    written = {"output_dir": recipe.folder, "cache": recipe.cache and Path(recipe.cache)}
    for field, place in written.items():
        for source, root in read.items():
            if place and root and is_among_images(place, Path(root).expanduser(), named, source == "path"):
                raise RecipeError(
                    f"'{field}' is {visible(place)}, which lies among the images of 'data.{source}' {visible(root)}: "
                    f"it would be read as images the next time. Name a folder outside of it: --{field} FOLDER."
                )
