"""Evaluation: accuracy, its split into within-task accuracy and task identification, and confidence.

An image is *right within its task* if the largest logit among its task's classes is that of its class, and its task
is *identified* if the largest of all logits belongs to one of its task's classes. A prediction is correct exactly if
both hold, so a task's accuracy is at most the smaller of the two.

Confidence is the largest softmax probability over all classes seen. For heads whose logits are not log-probabilities
(class means, ridge) it is what a user of the softmax would see, not what the head is designed for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import EvalPrediction, PredictionOutput, denumpify_detensorize, speed_metrics

from hf_cdl.training.arguments.workers import fitting_workers
from hf_cdl.training.checking import check_items, check_tasks, check_unlearnt
from hf_cdl.training.frozen import FrozenTrainer
from hf_cdl.training.kept.features import keepable
from hf_cdl.training.labelled import Labelled
from hf_cdl.training.progress import progress_bar
from hf_cdl.types import CDLOutput, Task, TaskResult

BINS = 15
ANY = slice(0, 2**62)
"""Stands for the classes where labels are not read."""


class EvaluatingTrainer(FrozenTrainer):
    """A Trainer whose evaluation measures accuracy on classes that come in tasks.

    Every image counts exactly once, and the model is never given a task id. Subclasses set the attributes.
    """

    # ---- Trainer's evaluation methods ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure accuracy in percent over all classes on a dataset, such as task.test, and any `compute_metrics`.

        With a dataset nothing is logged. Without one, it measures and logs what training measures at
        `eval_strategy`: the trainer's `eval_dataset`, in the same way, or else images of the newest task over that
        task's classes only: the accuracy of the model and of its teacher's path or paths. These are validation images
        if the accuracy can affect training (early stopping, best epoch, plateau, or any callback of the user's), and
        otherwise images of the evaluation split, which then affect nothing. Raises ValueError without any images.
        """
        _refuse_keys(ignore_keys)
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None:
            metrics = self._measure_newest(metric_key_prefix)
        else:
            check_items(given, self._known_classes)
            logits, labels = self._predictions(given)
            metrics = self._metrics(logits, labels, metric_key_prefix)
        if eval_dataset is None:
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Predict a dataset, as in Trainer: `predictions`, logits (N, C) in the dataset's order; `label_ids` (N,).

        C counts all classes. `metrics` has timings and, if the dataset has labels, accuracy in percent and any
        `compute_metrics`. Raises ValueError for anything but a dataset of images, or for labels of unknown classes.
        """
        _refuse_keys(ignore_keys)
        check_items(test_dataset, self._known_classes, "predict", labelled=False)
        start = time.time()
        logits, labels = self._predictions(test_dataset)
        metrics: dict[str, Any] = {} if labels is None else self._metrics(logits, labels, metric_key_prefix)
        batches = math.ceil(len(logits) / (self.args.eval_batch_size * self.args.world_size))
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(logits), num_steps=batches)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(_array(logits), None if labels is None else _array(labels), metrics)

    def _predictions(self, data: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (N, C) over all classes and labels (N,), or None without labels, in the dataset's order."""
        was_training, parts = self.model.training, []
        self.model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # a DataLoader draws a seed
            for batch in self._loader(data):
                found = {"logits": self.model(pixel_values=batch["pixel_values"]).logits}
                found |= {"labels": batch["labels"]} if "labels" in batch else {}
                parts.append(self._gathered(found))
        self.model.train(was_training)
        logits = torch.cat([part["logits"] for part in parts])
        if "labels" not in parts[0]:
            return logits, None
        return logits, torch.cat([part["labels"] for part in parts])

    def _measure_newest(self, prefix: str) -> dict[str, float]:
        """Accuracy of the model and its teacher on images of the newest task, over that task's classes only."""
        task = self._newest
        images, hits, said = self._evaluation_images(task), {}, []
        if not len(images or ()):
            beside = " and ".join(self._steering) or "training"
            raise ValueError(
                f"{task.name} has no images that evaluate() may read beside {beside}. "
                "Give one dataset, as evaluate(task.test), or use evaluate_seen()."
            )
        was_training = self.model.training
        self.model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for batch in self._loader(images, *self.teacher.views):
                student, teacher = self._student_and_teacher(self.model, batch, None)
                answers = {"": student.logits}
                if teacher is not None:
                    answers |= {"teacher_": teacher.logits, "prompt_path_": teacher.path_logits}
                for name, logits in answers.items():
                    if logits is not None:
                        hit = logits[:, task.classes].argmax(dim=-1) == batch["labels"] - task.first_class
                        hits.setdefault(name, []).append(self._gathered(hit))
                if self.compute_metrics is not None:
                    said.append(self._gathered((student.logits, batch["labels"])))
        self.model.train(was_training)
        metrics = {f"{prefix}_{name}accuracy": _percent(torch.cat(parts)) for name, parts in hits.items()}
        if said:
            logits, labels = map(torch.cat, zip(*said, strict=True))
            metrics |= self._users_metrics(logits, labels, prefix)
        return metrics

    def _metrics(self, logits: torch.Tensor, labels: Any, prefix: str) -> dict[str, float]:
        accuracy = _percent(logits.argmax(dim=-1) == labels)
        return {f"{prefix}_accuracy": accuracy, **self._users_metrics(logits, labels, prefix)}

    def _users_metrics(self, logits: torch.Tensor, labels: torch.Tensor, prefix: str) -> dict[str, float]:
        """Results of `compute_metrics`; one named `accuracy` replaces ours."""
        if self.compute_metrics is None:
            return {}
        found: Any = denumpify_detensorize(self.compute_metrics(EvalPrediction(_array(logits), _array(labels))))
        pairs = found.items() if isinstance(found, Mapping) else [(None, found)]
        if not all(isinstance(name, str) and isinstance(value, int | float) for name, value in pairs):
            raise ValueError(
                f'compute_metrics gave {found!r}, but must give a dict of names to numbers: {{"recall": 0.5}}.'
            )
        return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": v for name, v in found.items()}

    # ---- continual evaluation ----

    def evaluate_seen(self, unlearnt: Sequence[Any] = (), foreign: Any = None) -> TaskResult:
        """Measure accuracy in percent on each task seen so far, or read it from the ledger if it is there already.

        `unlearnt`: tasks that come later, and `foreign`: a dataset of images of no class; both show how well a model
        with a `known` score recognises unknown images.
        """
        task = self._newest
        stored = self.run.result(self.role, task) if self.run is not None else None
        if stored is not None and stored.row:
            return stored
        start, before = time.perf_counter(), self._used()
        choices = self.model.head.choices() if self.model.fitted else {}
        answers = self.answer(self.seen, unlearnt, foreign)
        result = replace(stored or TaskResult(self.role, task.index), choices=choices, **answers)
        result.eval_seconds = time.perf_counter() - start
        self._say_kept(result, before)
        if self.run is not None:
            self.run.save_result(result)
        return result

    def answer(self, tasks: list[Task], unlearnt: Sequence[Task] = (), foreign: Any = None) -> dict[str, Any]:
        """Evaluate the model on each task's evaluation split, without task ids; returns fields of TaskResult."""
        check_tasks(tasks)
        if unlearnt:
            check_unlearnt(unlearnt, tasks)
        if foreign is not None:
            check_items(foreign, ANY.stop, "foreign", labelled=False)
        for task in tasks:
            self._check_split(task)
        self.model.eval()
        if self.model.fitted:
            self._kept_features.begin(self.model)
        self._read_kept()
        title = self._title(tasks[-1])
        parts = [self._judged(task, f"{title} · test {task.index + 1}") for task in tasks]
        others = {"unlearnt": [getattr(task, self.eval_split) for task in unlearnt], "foreign": [foreign]}
        known = self._ood_metrics(parts, others, title)
        self._kept.flush()
        correct, confidence = (torch.cat([p[key] for p in parts if p]) for key in ("correct", "confidence"))
        rows = {"row": "correct", "within_task": "within_task", "task_identification": "task_identification"}
        return {
            "correct": [int(part["correct"].sum()) if part else 0 for part in parts],
            "counts": [len(part["correct"]) if part else 0 for part in parts],
            **{name: [_percent(part[key]) if part else None for part in parts] for name, key in rows.items()},
            "confidence": 100 * confidence.double().mean().item(),
            "calibration_error": calibration_error(confidence, correct),
            "known": known,
            "class_accuracy": {
                name: value
                for task, part in zip(tasks, parts, strict=True)
                if part
                for name, value in class_accuracy(
                    part["correct"], part["label"], task.class_names, task.first_class
                ).items()
            },
        }

    def _judged(self, task: Task, title: str) -> dict[str, torch.Tensor]:
        """What `judge` finds on all images of a task's evaluation split, and how `known` they are; {} without any."""
        found = []
        for output, batch in self._outputs(getattr(task, self.eval_split), title):
            own = judge(output.logits, batch["labels"], task.classes)
            own |= {} if output.known is None else {"known": output.known}
            found.append(self._gathered(own))
        return {name: torch.cat([batch[name] for batch in found]).cpu() for name in (found[0] if found else ())}

    def _outputs(self, split: Any, title: str, labelled: bool = True) -> Iterator[tuple[CDLOutput, dict[str, Any]]]:
        """The model's outputs for the images of a split, and the batches; `labelled`: with labels of known classes."""
        keep = self.accelerator.num_processes == 1 and keepable(split, self.model)
        if keep and (known := self._kept_features.find(split, self.model)) is not None:
            yield from known
            return
        loader, found = self._loader(split, classes=None if labelled else ANY) if len(split or ()) else (), []
        for batch in self._bar(title, iterable=loader):
            output = self._output(batch)
            if keep:
                found.append((output, {name: batch[name] for name in ("labels",) if name in batch}))
            yield output, batch
        if keep:
            self._kept_features.keep(split, found)

    def _gathered(self, values: Any) -> Any:
        """What all processes have of a batch, without images that were added to fill it up.

        One process has all of it: gather_for_metrics would cut it to the rest of any loader that was left open.
        """
        return values if self.accelerator.num_processes == 1 else self.accelerator.gather_for_metrics(values)

    def _ood_metrics(
        self, parts: list[dict[str, torch.Tensor]], others: Mapping[str, list[Any]], title: str
    ) -> dict[str, float]:
        """How well the model tells known images from others, in percent; {} for one without a `known` score.

        `others`: splits of them, by what they are.
        """
        told = [part["known"] for part in parts if "known" in part]
        if not told:
            return {}
        part, share = self.model.head.known, self.model.head.config.known
        least, known = part.threshold(share), torch.cat(told)
        found = {"kept": 100 * (known >= least).double().mean().item()}
        if (expected := part.passing(share)) is not None:
            found["unlearnt_passing_expected"] = 100 * expected
        for name, splits in others.items():
            theirs: list[torch.Tensor] = []
            for split in splits:
                for output, _ in self._outputs(split, f"{title} · {name}", labelled=False):
                    gathered: Any = self._gathered(output.known)
                    theirs.append(gathered.cpu())
            if theirs:
                found |= {f"{name}_{k}": v for k, v in ood_metrics(known, torch.cat(theirs), least).items()}
        return found

    @property
    def _newest(self) -> Task:
        if not self.seen:
            raise ValueError(
                "No task has been learnt yet; give it one first: learn(task). What a loaded model knows is measured "
                "by evaluate(dataset), as evaluate(task.test)."
            )
        return self.seen[-1]

    @property
    def _known_classes(self) -> int:
        return sum(map(len, self.model.tasks))

    # ---- images ----

    def _loader(self, split: Any, *others: str, classes: slice | None = None) -> Any:
        """Every image once, as seen by the role and the `others`; Trainer would drop the last incomplete batch."""
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            with fitting_workers(self.args, len(split), self.args.eval_batch_size):
                return self.get_test_dataloader(self._as_seen(split, classes, *others))
        finally:
            self.args.dataloader_drop_last = dropping

    def _as_seen(self, split: Any, classes: slice | None, *others: str) -> Any:
        """A split as seen by this role's model and the `others`, labelled with `classes`; None: all that are known.

        Most users' own splits look the same to all roles.
        """
        seen = split.seen_by(self.role, *others) if hasattr(split, "seen_by") else split
        self._kept.hold(split)
        return Labelled(seen, range(self._known_classes) if classes is None else range(classes.start, classes.stop))

    def _bar(self, title: str, **options: Any) -> Any:
        return progress_bar(title, self.args.disable_tqdm or not self.is_world_process_zero(), **options)


def judge(logits: torch.Tensor, labels: torch.Tensor, classes: slice) -> dict[str, torch.Tensor]:
    """Judge the predictions for a batch of one task.

    `logits`: (B, C) over all classes seen; `labels`: (B,) of the task whose classes are `classes`. Returns `correct`,
    `within_task`, `task_identification`: (B,) bool; `confidence`: (B,) in 0..1; `label` as given.
    """
    predicted = logits.argmax(dim=-1)
    return {
        "correct": predicted == labels,
        "within_task": logits[:, classes].argmax(dim=-1) == labels - classes.start,
        "task_identification": (classes.start <= predicted) & (predicted < classes.stop),
        "confidence": logits.float().softmax(dim=-1).amax(dim=-1),
        "label": labels,
    }


def class_accuracy(correct: torch.Tensor, label: torch.Tensor, names: Sequence[str], first: int) -> dict[str, float]:
    """Accuracy in percent per class, over N images; classes without images are left out.

    `first` is the label of `names[0]`.
    """
    own = {name: correct[label == first + number] for number, name in enumerate(names)}
    return {name: 100 * hits.double().mean().item() for name, hits in own.items() if len(hits)}


def calibration_error(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Expected calibration error in percentage points: |accuracy - mean confidence| over 15 bins of equal width.

    Both arguments are (N,), N > 0; a bin (i/15, (i+1)/15] is weighted by its share of the images. Naeini et al. 2015,
    as used by Guo et al. 2017 (arXiv:1706.04599, eq. 3).
    """
    confidence = confidence.cpu().double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gap = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, correct.cpu().double() - confidence)
    return 100 * gap.abs().sum().item() / len(confidence)


def ood_metrics(known: torch.Tensor, others: torch.Tensor, least: float) -> dict[str, float]:
    """How well scores tell images of known classes (N,) from others (M,), in percent.

    `auroc`: area under the ROC curve, the share of pairs in which the known image has the larger score (ties count
    half); `fpr95`: share of the others above the score that 95 % of the known ones reach; `passing`: share of the
    others that reach `least`. As in Hendrycks and Gimpel 2017 (arXiv:1610.02136).
    """
    known, others = known.double().sort().values, others.double()
    below = torch.searchsorted(known, others) + torch.searchsorted(known, others, right=True)
    return {
        "auroc": 100 * (1 - below.double().mean().item() / 2 / len(known)),
        "fpr95": 100 * (others >= torch.quantile(known, 0.05)).double().mean().item(),
        "passing": 100 * (others >= least).double().mean().item(),
    }


def _percent(hits: torch.Tensor) -> float:
    return 100 * int(hits.sum()) / len(hits)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A NumPy array; bfloat16, which NumPy lacks, becomes float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def _refuse_keys(ignore_keys: Any) -> None:
    if ignore_keys:
        raise ValueError(f"ignore_keys is {ignore_keys!r}, but predictions are the logits alone; leave it out.")
