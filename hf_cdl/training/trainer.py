"""CDLTrainer: transformers' Trainer, task after task. A teacher is a CDLTrainer whose objective has no terms."""

from __future__ import annotations

import copy
import json
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from hf_cdl.data.sampler import ViewSampler
from hf_cdl.distill import Objective
from hf_cdl.runs.files import RunError, first_line, write_whole
from hf_cdl.runs.run import Run
from hf_cdl.training.arguments import CDLTrainingArguments
from hf_cdl.training.checking import check_items, check_names, check_parts, check_served, check_task, check_tasks
from hf_cdl.training.evaluation import calibration_error, class_accuracy, judge
from hf_cdl.training.phase import PhaseTrainer, peak_memory
from hf_cdl.training.progress import PhaseProgress, progress_bar
from hf_cdl.training.trackers import close_trackers, replace_trackers
from hf_cdl.types import CDLOutput, Task, TaskResult


class CDLTrainer(PhaseTrainer):
    """Trains one continual model; distils from `teacher` what the objective's terms ask for.

    `learn(task)` trains on one task with a fresh optimizer and stores the result in the run's ledger; for a task
    that is finished it returns at once, for one that was cut off it goes on from its last stored step. A task that
    it could not learn raises ValueError before anything is changed.
    `evaluate_seen()` measures the accuracy on every task seen so far, with one head over all classes and no task id;
    `eval_split` is the split it reads. Without a `run` nothing is stored. `check(task)` says beforehand what the
    arguments ask for and the task lacks. Raises FloatingPointError when a loss is no longer a number,
    or a head cannot be fitted to what is none.
    """

    def __init__(
        self,
        model: Any,
        args: CDLTrainingArguments,
        objective: Objective | None = None,
        teacher: Any = None,
        role: str = "student",
        run: Run | None = None,
        eval_split: str = "test",
        processor: Any = None,
        num_tasks: int | None = None,
    ):
        self.objective = Objective() if objective is None else objective
        check_parts(model, args, self.objective, teacher)
        check_names(role, eval_split, num_tasks)
        args = copy.copy(args)  # what is set below is of this trainer
        if self.objective.needs_teacher:
            self.objective.attach(teacher)
        if args.gradient_checkpointing and not _computes_again(model):
            raise ValueError(
                f"activation_checkpointing is true, but the layers of this {type(model).__name__} cannot compute "
                "their activations again; leave it out."
            )
        model.scaffold = self.objective if any(True for _ in self.objective.parameters()) else None
        if model.scaffold is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # DDP looks for them in the model's forward: terms come after it
        super().__init__(model=model, args=args, processing_class=processor, eval_dataset={})  # for eval_strategy
        self.teacher: Any = teacher if self.objective.needs_teacher else None
        self.head_teacher = teacher if model.fitted and model.head.needs_teacher else None
        self.shares_query = self.teacher is not None and _shares_query(model, self.teacher)
        self.role, self.run, self.eval_split, self.num_tasks = role, run, eval_split, num_tasks
        self.seen: list[Task] = []
        self._sampler: ViewSampler | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._steps_summed = self._images = 0
        self._micro_batches = 1
        self._seconds_before = 0.0
        self._steps_learnt = 0
        self._best: dict[str, torch.Tensor] = {}
        self._phase = PhaseProgress(self._phase_bar, self._set_epoch)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(self._phase)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        place = Path(str(args.output_dir)) if run is None else run.folder
        name = args.run_name or (place.name if run is None else run.recipe.get("name", place.name))
        lasting = place / "trackers" if run is None else place / "logs" / "trackers"
        replace_trackers(self, lasting / role, f"{name}-{role}", self._steps_before)
        if run is None:
            self.args.save_strategy = SaveStrategy.NO
        for found in (self.teacher, self.head_teacher):
            if found is not None:
                found.to(self.args.device)

    # ---- the two verbs ----

    def learn(self, task: Task) -> None:
        """Train on a task, unless the ledger says that it is done, or the model came with it (`known_classes`)."""
        check_tasks([task])
        if task.index != len(self.seen):
            raise ValueError(f"Tasks come in order: expected task {len(self.seen) + 1}, got task {task.index + 1}.")
        if self.model.fitted and self.model.head.needs_teacher and self.head_teacher is None:
            raise ValueError("The head's soft_targets need a teacher, but none was given.")
        done = self.run is not None and self.run.result(self.role, task) is not None
        came_with = self._came_with(task)
        if not done and not came_with:
            check_served(self.model, task)
            check_task(self.role, self.model, self.objective, self.args, task)
            self.check(task)
        self.seen.append(task)
        if done or came_with:
            return
        self._begin(task)
        if self._take_over(task):
            return
        result = TaskResult(self.role, task.index)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.state.log_history = []
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            self._train(task, result)
        if self.model.fitted:
            self._fit_head(task, result)
        self.model.end_task()
        self.objective.end_task()
        result.peak_memory_bytes = peak_memory()
        if self.run is not None:
            self.run.save_task(result, task, self._write_checkpoint, self.state.log_history)
            self.accelerator.wait_for_everyone()

    def _take_over(self, task: Task) -> bool:
        """Load and save what another run has learnt, if the recipe says so (`ROLE_from`); no file of it is copied."""
        found = None if self.run is None else self.run.taken(self.role, task)
        if self.run is None or found is None:
            return False
        checkpoint, result, history = found
        self.model.end_session()
        self.model.load_state_dict(type(self.model).from_pretrained(checkpoint).state_dict())
        self.run.save_task(result, task, self._write_checkpoint, history)
        self.accelerator.wait_for_everyone()
        return True

    def evaluate_seen(self) -> TaskResult:
        """Accuracy in percent on each task seen so far; from the ledger if it is there already."""
        task = self._newest
        stored = self.run.result(self.role, task) if self.run is not None else None
        if stored is not None and stored.row:
            return stored
        start = time.perf_counter()
        result = replace(stored or TaskResult(self.role, task.index), **self.answer(self.seen))
        result.eval_seconds = time.perf_counter() - start
        if self.run is not None:
            self.run.save_result(result)
        return result

    def answer(self, tasks: list[Task]) -> dict[str, Any]:
        """How the model answers the images of each task's evaluation split, no task id given: fields of TaskResult."""
        check_tasks(tasks)
        for task in tasks:
            self._check_split(task)
        self.model.eval()
        parts = []
        for task in tasks:
            split, found = getattr(task, self.eval_split), []
            loader = self._loader(split) if len(split) else ()
            for batch in self._bar(f"{self._title(tasks[-1])} · test {task.index + 1}", iterable=loader):
                with torch.no_grad():
                    logits = self.model(pixel_values=batch["pixel_values"]).logits
                found.append(self.accelerator.gather_for_metrics(judge(logits, batch["labels"], task.classes)))
            names = found[0] if found else ()
            parts.append({name: torch.cat([batch[name] for batch in found]).cpu() for name in names})
        correct, confidence = (torch.cat([p[key] for p in parts if p]) for key in ("correct", "confidence"))
        rows = {"row": "correct", "within_task": "within_task", "task_identification": "task_identification"}
        return {
            "correct": [int(part["correct"].sum()) if part else 0 for part in parts],
            "counts": [len(part["correct"]) if part else 0 for part in parts],
            **{name: [_percent(part[key]) if part else None for part in parts] for name, key in rows.items()},
            "confidence": 100 * confidence.double().mean().item(),
            "calibration_error": calibration_error(confidence, correct),
            "class_accuracy": {
                name: value
                for task, part in zip(tasks, parts, strict=True)
                if part
                for name, value in class_accuracy(
                    part["correct"], part["label"], task.class_names, task.first_class
                ).items()
            },
        }

    # ---- one phase ----

    def _came_with(self, task: Task) -> bool:
        """Whether the task was learnt elsewhere: it has no training images, and the model knows its classes."""
        return not len(task.train) and self.model.tasks[task.index : task.index + 1] == [list(task.class_names)]

    def _begin(self, task: Task) -> None:
        """Give the model its new task, initialised from (seed, role, task) alone."""
        known = self.model.tasks
        set_seed(zlib.crc32(f"{self.args.seed}/{self.role}/{task.index}".encode()))
        if len(known) == task.index:
            self.model.begin_task(task.class_names)
        elif len(known) != task.index + 1 or known[task.index] != list(task.class_names):
            raise ValueError(
                f"The model knows {len(known)} tasks {[len(names) for names in known]}, which does not fit task "
                f"{task.index + 1} with classes {list(task.class_names)[:5]} ... Load the last task's checkpoint."
            )
        if self.model.scaffold is not None and self.run is not None and task.index > self.run.origin.get("tasks", 0):
            file = self.run.scaffold_file(self.role, task.index - 1)  # the terms' own layers go on
            try:
                self.model.scaffold.load_state_dict(load_file(file))
            except (OSError, RuntimeError, SafetensorError) as error:
                raise RunError(
                    f"{file} cannot be loaded ({first_line(error)}), so the layers that the terms own are lost. Put "
                    "it back from a copy, or start again in another folder with --output_dir FOLDER."
                ) from error
        if self.teacher is not None:
            self.model.follow(self.teacher)
            self.objective.begin_task(self.teacher)

    def _train(self, task: Task, result: TaskResult) -> None:
        last = self._stored_state(task)
        if last is None:
            self._measure(task)
        self.train_dataset = self._as_seen(task.train, *(() if self.teacher is None else ("teacher",)))
        self.optimizer = self.lr_scheduler = None  # new for every task and phase
        self.model_wrapped = self.model
        self._sums, self._steps_summed, self._images, self._seconds_before = {}, 0, 0, 0.0
        self._begin_callbacks()
        if last is not None:
            self._seconds_before = json.loads((Path(last) / "phase.json").read_text())["seconds"]
        teacher, mode = self.teacher, self.teacher is not None and self.teacher.training
        if teacher is not None:  # its own phase left it in training mode
            self.teacher = self.accelerator.prepare_model(teacher.eval(), evaluation_mode=True)
        try:
            start = time.perf_counter()
            metrics = self.train(resume_from_checkpoint=last).metrics
            result.train_seconds = self._seconds_before + time.perf_counter() - start
            result.images_per_second = metrics["train_samples_per_second"]
            self._steps_learnt += self.state.global_step
        finally:  # take Accelerate's wrappers off again: they would pile up, task by task
            self._phase.close()
            close_trackers(self)  # a cut-off phase has none of its own to end them
            self.model = self._unprepare(self.model_wrapped)
            if teacher is not None:
                self.teacher = self._unprepare(self.teacher)
                self.teacher.train(mode)

    def _measure(self, task: Task) -> None:
        """Fix the statistics of the first task's features, for heads that standardise with them."""
        if self.model.unmeasured:
            for output, *_ in self._features(task):
                self.model.measure(output)

    def _fit_head(self, task: Task, result: TaskResult) -> None:
        """Fit the head by one pass over the task's un-augmented images; what its features come from is fixed now."""
        start = time.perf_counter()
        self.model.end_session()
        self._measure(task)
        for output, labels, taught in self._features(task):
            self.model.head.accumulate(output.features, labels - task.first_class, taught)
        seconds = time.perf_counter() - start
        result.train_seconds += seconds
        result.images_per_second = result.images_per_second or len(task.train) / seconds  # training's, if it trained

    def _features(self, task: Task) -> Iterator[tuple[CDLOutput, torch.Tensor, torch.Tensor | None]]:
        """Of the task's un-augmented images, of all processes, batch by batch: the model's outputs, the labels, and
        what the head learns of its teacher's answers over the task's classes, if it has one.
        """
        self.model.eval()
        teacher = None if self.head_teacher is None else self.head_teacher.eval()
        others = () if teacher is None else ("teacher",)
        for batch in self._bar(self._title(task), iterable=self._loader(task.train, *others)):
            taught = None
            with torch.no_grad():
                output = self.model(pixel_values=batch["pixel_values"])
                if teacher is not None:
                    seen = batch.get("teacher_pixel_values", batch["pixel_values"])
                    taught = teacher(pixel_values=seen).logits[:, task.classes].float()
                    taught = self.model.head.targets(taught, teacher.head)
            found: Any = {"features": output.features, "kd_features": output.kd_features, "labels": batch["labels"]}
            found = {key: v for key, v in {**found, "taught": taught}.items() if v is not None}
            found = self.accelerator.gather_for_metrics(found)
            labels, taught = found.pop("labels"), found.pop("taught", None)
            yield CDLOutput(**found), labels, taught

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective on a batch: one query pass, one teacher pass without gradient, one student pass.

        A micro-batch's `weight` makes the gradient of its step the mean over the images of all of them.
        """
        task, weight = self.seen[-1], inputs.get("weight", 1.0)
        student, teacher = self._answers(model, inputs, task.index)
        losses = self.objective(student, teacher, inputs["labels"], task.classes)
        self._watch(losses, weight)
        loss = weight * losses["loss"]
        return (loss, student) if return_outputs else loss

    def _answers(
        self, model: nn.Module, inputs: dict[str, Any], task_id: int | None
    ) -> tuple[CDLOutput, CDLOutput | None]:
        """What the model and its teacher, if it has one, say to a batch."""
        pixels = inputs["pixel_values"]
        theirs = inputs.get("teacher_pixel_values")  # there if the teacher sees another view of the same crop
        query, teacher, asked = None, None, {}
        share = self.shares_query and theirs is None
        with torch.no_grad(), self.accelerator.autocast():
            if share or self.objective.needs_query:
                query = self.model.compute_query(pixels)
            if self.teacher is not None:
                asked = {
                    "pixel_values": pixels if theirs is None else theirs,
                    "query": query if share else None,
                    "task_id": task_id,
                    "output_hidden_states": self._layers("teacher"),
                }
                teacher = self.teacher(**asked)
        if teacher is not None:
            with self.accelerator.autocast():  # with gradient: a term may tune a path of its own beside the teacher's
                teacher = self.objective.consult(teacher, asked)
        student: CDLOutput = model(
            pixel_values=pixels, query=query, task_id=task_id, output_hidden_states=self._layers("student")
        )
        return student, teacher

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Accuracies in percent on images of the newest task, among its own classes: the model's, and those of its
        teacher's path or paths. Runs during training at `eval_strategy`.

        The images are validation images if the accuracy has a say in the training (early stopping, the best epoch, a
        plateau, a user's callback, whatever it does), else those of the evaluation split; then it changes nothing.
        With an `eval_dataset`, as task.test: the model's accuracy on it, among all its classes; nothing is logged.
        """
        if eval_dataset is not None:
            check_items(eval_dataset, sum(map(len, self.model.tasks)))
            return {f"{metric_key_prefix}_accuracy": self._accuracy(eval_dataset)}
        task, hits = self._newest, {}
        if not len(self._watched(task) or ()):
            beside = " and ".join(self._steering) or "training"
            raise ValueError(
                f"{task.name} has no images that evaluate() may read beside {beside}. "
                "Give one dataset, as evaluate(task.test), or use evaluate_seen()."
            )
        was_training = self.model.training
        self.model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # a loader draws a seed
            for batch in self._loader(self._watched(task), "teacher"):
                student, teacher = self._answers(self.model, batch, None)
                said = {"": student.logits}
                if teacher is not None:
                    said |= {"teacher_": teacher.logits, "prompt_path_": teacher.path_logits}
                for name, logits in said.items():
                    if logits is not None:
                        hit = logits[:, task.classes].argmax(dim=-1) == batch["labels"] - task.first_class
                        hits.setdefault(name, []).append(self.accelerator.gather_for_metrics(hit))
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}accuracy": _percent(torch.cat(parts)) for name, parts in hits.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _accuracy(self, data: Any) -> float:
        was_training = self.model.training
        self.model.eval()
        hits = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for batch in self._loader(data):
                hit = self.model(pixel_values=batch["pixel_values"]).logits.argmax(dim=-1) == batch["labels"]
                hits.append(self.accelerator.gather_for_metrics(hit))
        self.model.train(was_training)
        return _percent(torch.cat(hits))

    @property
    def _newest(self) -> Task:
        if not self.seen:
            raise ValueError("No task has been learnt yet; give it one first: learn(task).")
        return self.seen[-1]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: Trainer's would measure by a loss of the newest task."""
        raise ValueError("predict is not supported; use evaluate(dataset), answer(tasks), or the model itself.")

    def _layers(self, role: Any) -> list[int] | None:
        """The hidden states of a model that the objective asks for."""
        return self.objective.hidden_states(role) or None

    # ---- files, and what the user sees ----

    def _write_checkpoint(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        scaffold = self.model.scaffold
        if scaffold is not None and self.run is not None:  # not into the model's files, but needed to resume
            file = self.run.scaffold_file(self.role, self.seen[-1].index)
            layers = {name: value.contiguous() for name, value in scaffold.state_dict().items()}
            write_whole(file, lambda path: save_file(layers, path))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _loader(self, split: Any, *others: str) -> Any:
        """Every image once, as the role (and the `others`) see it: Trainer would drop the last incomplete batch."""
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return self.get_test_dataloader(self._as_seen(split, *others))
        finally:
            self.args.dataloader_drop_last = dropping

    def _as_seen(self, split: Any, *others: str) -> Any:
        """A split as this role's model sees it, and the `others` too; most users' own splits look the same to all."""
        return split.seen_by(self.role, *others) if hasattr(split, "seen_by") else split

    def _bar(self, title: str, **options: Any) -> Any:
        return progress_bar(title, self.args.disable_tqdm or not self.is_world_process_zero(), **options)

    def _phase_bar(self, **options: Any) -> Any:
        return self._bar(self._title(self.seen[-1]), **options)


def _shares_query(student: Any, teacher: Any) -> bool:
    """Whether one query pass serves both models: the same frozen weights answer for the teacher and the student."""
    if not (teacher.needs_query and student.needs_query) or student.config.train_backbone:
        return False
    if teacher.config.query_view is not None:  # the same weights, but not the same pixels
        return False
    first, second = (
        model.backbone if model.query_backbone is None else model.query_backbone for model in (student, teacher)
    )
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        value.shape == theirs[name].shape and torch.equal(value.cpu(), theirs[name].cpu())
        for name, value in ours.items()
    )


def _computes_again(model: Any) -> bool:
    """Whether layers of the model can compute their activations again in the backward pass."""
    layers = any(hasattr(layer, "gradient_checkpointing") for layer in model.modules())
    return layers and hasattr(model, "gradient_checkpointing_enable")


def _percent(hits: torch.Tensor) -> float:
    return 100 * int(hits.sum()) / len(hits)
