"""A page that shows a model as it was after each of its tasks: its answers for an image, and its accuracy.

Locally, `hf-cdl demo` shows it. In a Space, the variable HF_CDL_REPO names the Hub repository that a run was pushed
to, OWNER/NAME; HF_CDL_TRUST_REMOTE_CODE=1 runs the code in that repository, for when hf_cdl is not installed;
HF_CDL_REJECT and HF_CDL_COMPARE are the options --reject (1: the head's own share) and --compare of `hf-cdl demo`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from markup import CSS, answers_html, counted, plain, state_html
from states import States, StatesError

Examples = Callable[[Sequence[str]], Sequence[Any]]
"""Images to choose from, PIL's or files, for a model that knows these classes."""
_NARROW = 240
"""Least width of a column in pixels: with gradio's own, the second state would be below the first on most screens."""


@dataclass(frozen=True)
class _Parts:
    """The parts of the page that follow a slider; `gr` is gradio."""

    states: States
    gr: Any

    def classify(self, image: Any, task: int) -> str:
        if image is None:
            return "Upload an image, or choose an example."
        with _shown_errors(self.gr):
            found = self.states.results(task)
            return answers_html(self.states.classifier(task)(image), [] if found.change else found.class_names)

    def describe(self, task: int) -> str:
        with _shown_errors(self.gr):
            return state_html(self.states.results(task))

    def answers(self, image: Any, start: int) -> Any:
        """A slider that begins at a task, and below it the answers for the image; returns the slider."""
        first, last = self.states.tasks[0], self.states.tasks[-1]
        if first == last:  # a slider with a single position fails
            task = self.gr.Number(last, label="The model after task", interactive=False, precision=0)
        else:
            task = self.gr.Slider(first, last, start, step=1, label="The model after task")
        answers = self.gr.HTML(self.classify(None, start))
        self.gr.on([image.change, task.change], self.classify, [image, task], answers, trigger_mode="always_last")
        return task

    def state(self, task: Any) -> None:
        """What the model knew after the task that a slider is at."""
        state = self.gr.HTML(self.describe(task.value))
        task.change(self.describe, task, state, trigger_mode="always_last")


def build(states: States, gr: Any, beside: int | None = None, examples: Examples | None = None) -> Any:
    """The page; `gr` is gradio, `beside`: the task of a second slider, `examples`: see `show`."""
    newest, parts = states.results(states.tasks[-1]), _Parts(states, gr)
    title = f"{plain(newest.name)}, task after task"
    names = [name for names in newest.class_names for name in names]
    chosen = [*(examples(names) if examples else [])] or fitting(names, states.reject is not None)
    with gr.Blocks(title=title) as page:
        gr.HTML(f"<h1>{escape(title)}</h1><p>{_about(states)}</p>")
        with gr.Row():
            with gr.Column(min_width=_NARROW):
                # a path, because the pipeline decodes the file; PNG, which keeps the pixels of examples
                image = gr.Image(type="filepath", image_mode=None, format="png", label="Image", height=240)
                if chosen:
                    gr.Examples(chosen, image)
                task = parts.answers(image, states.tasks[-1]) if beside is None else None
            if task is not None:
                with gr.Column():
                    parts.state(task)
            for start in (beside, states.tasks[-1]) if beside is not None else ():
                with gr.Column(min_width=_NARROW):
                    parts.state(parts.answers(image, start))
    return page


def _about(states: States) -> str:
    newest = states.results(last := states.tasks[-1])
    tasks = len(newest.accuracy_matrix)
    known = counted(sum(map(len, newest.class_names)), "class")
    about = f"{escape(plain(states.where))}: {known} learnt in {counted(tasks, 'task')}"
    about += "" if newest.change is None else f" and {counted(last - tasks, 'change')}"
    about += ". The slider goes back to the model as it was after an earlier task."
    if states.reject is not None:
        about += " Images unlike those of its classes are <b>unknown</b>; "
        about += "their score is the share of known images that look more familiar."
    return about


def fitting(class_names: Sequence[str], reject: bool) -> list[str]:
    """The images in examples/ that are named after one of the classes (bus.png, bus-2.png); says which are not.

    With `reject`, also those that are named unknown.
    """
    known = {*class_names, *(["unknown"] if reject else [])}
    files = sorted(Path(__file__).parent.glob("examples/*"))
    fit = [file for file in files if file.stem in known or re.sub(r"[ _-]?\d+$", "", file.stem) in known]
    if left := [plain(file.name) for file in files if file not in fit]:
        said = f"note: of the examples {', '.join(left)} are left out: the model knows no classes of these names"
        print(said, file=sys.stderr)
    return [*map(str, fit)]


@contextmanager
def _shown_errors(gr: Any) -> Iterator[None]:
    """Show errors on the page."""
    try:
        yield
    except (StatesError, ValueError) as error:  # the latter: an image that cannot be read
        raise gr.Error(escape(plain(error))) from error  # gradio shows it as HTML


def show(
    where: str,
    trust_remote_code: bool,
    reject: float | bool | None = None,
    compare: str | None = None,
    examples: Examples | None = None,
) -> int:
    """Show a model's states until the page is stopped; 2 if there are none, or if gradio is missing.

    `where`: OWNER/NAME on the Hub, a run's folder or a model's in it; `trust_remote_code`: whether its code is run;
    `reject`: of the pipeline, see hf_cdl.serving; `compare`: an earlier state, task-NN, to show beside the newest;
    `examples`: None, or if it finds none, those in examples/ that fit.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        states = States(where, trust_remote_code, reject)
        beside = None if compare is None else states.earlier(compare)
        for task in (states.tasks[-1], *([] if beside is None else [beside])):
            states.classifier(task)  # report loading errors here, not on the page
        gr: Any = import_module("gradio")
        page = build(states, gr, beside, examples)
    except ModuleNotFoundError as error:
        print(f'error: {error}; the demo needs gradio: pip install "hf-cdl[demo]"', file=sys.stderr)
        return 2
    except StatesError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    # these fonts need no download
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(css=CSS, theme=theme, footer_links=["gradio", "settings"])
    return 0


if __name__ == "__main__":
    repository = os.environ.get("HF_CDL_REPO")
    if not repository:
        sys.exit("error: set the Space's variable HF_CDL_REPO to the model's repository, OWNER/NAME")
    trust, given = os.environ.get("HF_CDL_TRUST_REMOTE_CODE") == "1", os.environ.get("HF_CDL_REJECT") or None
    if given is not None and not re.fullmatch(r"1|0?\.\d+", given):
        sys.exit(f"error: HF_CDL_REJECT is {plain(given)}, but takes a share such as 0.95, or 1 for that of the head")
    share = None if given is None else given == "1" or float(given)
    sys.exit(show(repository, trust, share, os.environ.get("HF_CDL_COMPARE") or None))
