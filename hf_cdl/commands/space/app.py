"""A page that shows a model as it was after each of its tasks: its answers for an image, and its accuracy.

Locally, `hf-cdl demo` shows it. In a Space, the variable HF_CDL_REPO names the Hub repository that a run was pushed
to, OWNER/NAME; HF_CDL_TRUST_REMOTE_CODE=1 runs the code in that repository, for when hf_cdl is not installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from markup import CSS, answers_html, plain, state_html
from states import States, StatesError


def build(states: States, gr: Any) -> Any:
    """The page; `gr` is gradio."""
    first, last = states.tasks[0], states.tasks[-1]
    newest = states.results(last)
    title = f"{plain(newest.name)}, task after task"
    tasks = len(newest.accuracy_matrix)
    about = f"{escape(plain(states.where))}: {sum(map(len, newest.class_names))} classes learnt in {tasks} tasks"
    about += "" if newest.change is None else f" and {last - tasks} changes"

    def classify(image: Any, task: int) -> str:
        if image is None:
            return "Upload an image, or choose an example."
        with _told(gr):
            found = states.results(task)
            return answers_html(states.classifier(task)(image), [] if found.change else found.class_names)

    def describe(task: int) -> str:
        with _told(gr):
            return state_html(states.results(task))

    with gr.Blocks(title=title) as page:
        gr.HTML(
            f"<h1>{escape(title)}</h1><p>{about}. "
            "The slider goes back to the model as it was after an earlier task.</p>"
        )
        with gr.Row():
            with gr.Column():
                # a path, because the pipeline decodes the file
                image = gr.Image(type="filepath", image_mode=None, label="Image", height=240)
                if examples := sorted(map(str, Path(__file__).parent.glob("examples/*"))):
                    gr.Examples(examples, image)
                if first == last:  # a slider with a single position fails
                    task = gr.Number(last, label="The model after task", interactive=False, precision=0)
                else:
                    task = gr.Slider(first, last, last, step=1, label="The model after task")
                answers = gr.HTML(classify(None, last))
            with gr.Column():
                state = gr.HTML(describe(last))
        gr.on([image.change, task.change], classify, [image, task], answers, trigger_mode="always_last")
        task.change(describe, task, state, trigger_mode="always_last")
    return page


@contextmanager
def _told(gr: Any) -> Iterator[None]:
    """Show errors on the page."""
    try:
        yield
    except (StatesError, ValueError) as error:  # the latter: an image that cannot be read
        raise gr.Error(escape(plain(error))) from error  # gradio shows it as HTML


def show(where: str, trust_remote_code: bool) -> int:
    """Show a model's states until the page is stopped; 2 if there are none, or if gradio is missing.

    `where`: OWNER/NAME on the Hub, or a model's folder in a run; `trust_remote_code`: whether its code is run.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        states = States(where, trust_remote_code)
        states.classifier(states.tasks[-1])  # report loading errors here, not on the page
        gr: Any = import_module("gradio")
        page = build(states, gr)
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
    sys.exit(show(repository, os.environ.get("HF_CDL_TRUST_REMOTE_CODE") == "1"))
