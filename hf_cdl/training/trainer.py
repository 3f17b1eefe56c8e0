"""CDLTrainer: transformers' Trainer, task after task. A teacher is a CDLTrainer whose objective has no terms."""

from __future__ import annotations

import json
import time
import zlib
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy, TrainOutput

from hf_cdl.counted import counted
from hf_cdl.data.unlabelled import WithUnlabelled, join_unlabelled
from hf_cdl.distill import Objective
from hf_cdl.runs.files import write_whole
from hf_cdl.runs.ledger import revision_name
from hf_cdl.runs.run import Run
from hf_cdl.runs.shards import save_checkpoint
from hf_cdl.training.arguments import CDLTrainingArguments
from hf_cdl.training.checking import (
    check_measured,
    check_names,
    check_new,
    check_not_cut_off,
    check_order,
    check_parts,
    check_served,
    check_task,
    check_tasks,
    check_used,
    learnt_elsewhere,
)
from hf_cdl.training.compiling import compiled
from hf_cdl.training.fitting import FittingTrainer
from hf_cdl.training.kept.features import KeptFeatures
from hf_cdl.training.memory import gc_frozen, peak_memory
from hf_cdl.training.precision import frozen_autocast
from hf_cdl.training.progress import PhaseProgress
from hf_cdl.training.sharding import gathered, shard_teacher
from hf_cdl.training.stored_state import load_scaffold
from hf_cdl.training.teacher import Teacher, unprepared
from hf_cdl.training.trackers import close_trackers, replace_trackers
from hf_cdl.training.trainer_contract import Total, check_given, check_keywords, check_train, refused, tasks_of
from hf_cdl.types import Task, TaskResult


class CDLTrainer(FittingTrainer):
    """Trains one continual model, distilling from `teacher` as the objective's terms require.

    Use it like Trainer: `train()` learns the tasks of `train_dataset` (a TaskStream, a list of tasks, or one task),
    `evaluate(dataset)` and `predict(dataset)` measure over all classes, with `compute_metrics`; `callbacks` run in
    every task. `args`: CDLTrainingArguments, or transformers' own. Features of Trainer that make no sense here are
    refused by name.

    `learn(task)` trains on one task with a fresh optimizer and stores the result in the run's ledger; for a finished
    task it returns at once, and an interrupted one resumes from its last stored step. A task that cannot be learnt
    raises ValueError before anything is changed.
    `cache`: a folder in which queries, teachers' outputs and features of fitted heads are stored for other runs too.
    `evaluate_seen()` measures the accuracy on every task seen so far, with one head over all classes and no task id,
    on `eval_split`. Without a `run` nothing is stored. `check(task)` reports in advance what the arguments need and
    the task lacks. Raises FloatingPointError if a loss is not finite, or if a head is fitted to non-finite values.
    """

    def __init__(
        self,
        model: Any,
        args: CDLTrainingArguments | TrainingArguments,
        objective: Objective | None = None,
        teacher: Any = None,
        role: str = "student",
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        run: Run | None = None,
        eval_split: str = "test",
        num_tasks: int | None = None,
        cache: str | Path | None = None,
        **others: Any,
    ):
        check_keywords(others, [*signature(CDLTrainer).parameters][:-1])
        check_given(compute_metrics, callbacks, processing_class, eval_dataset, run)
        args = CDLTrainingArguments.of(args)  # a copy: the changes below are this trainer's only
        self.objective = Objective() if objective is None else objective
        check_parts(model, args, self.objective, teacher)
        check_names(role, eval_split, num_tasks)
        check_used(model, args, callbacks, run, self.objective)
        self.tasks, self.teacher = tasks_of(train_dataset), Teacher(teacher, model, self.objective)
        shard_teacher(args, role, model, teacher, run)
        model.scaffold = self.objective if any(True for _ in self.objective.parameters()) else None
        if model.scaffold is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # DDP searches the model's forward; the terms run after it
        args.logging_nan_inf_filter = False  # it waits for a GPU at every step; `_check_losses` watches
        more: Any = {"compute_metrics": compute_metrics}
        more["eval_dataset"] = {}  # Trainer requires one for eval_strategy
        more["processing_class"] = processing_class
        super().__init__(model, args, callbacks=[*(callbacks or ())], **more)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.role, self.run, self.eval_split, self.num_tasks = role, run, eval_split, num_tasks
        self._begin(cache)

    def _begin(self, cache: str | Path | None) -> None:
        """Start with no task learnt; replace Trainer's progress, early stopping and trackers with task-aware ones."""
        self.num_tasks = self.num_tasks or (self.tasks[-1].index + 1 if self.tasks else None)
        self.seen: list[Task] = []
        self._cut_off: Task | None = None  # the task that an error or Ctrl-C interrupted
        self._session: Any = None
        self._best = {}
        self._total, self._steps_learnt, self._kept_features = Total(), 0, KeptFeatures()
        self._begin_counting()
        self.teacher.place(self.accelerator, partial(frozen_autocast, self.args))
        self._begin_keeping(cache)
        args, run = self.args, self.run
        self._phase = PhaseProgress(lambda **shown: self._bar(self._title(self.seen[-1]), **shown), self._set_epoch)
        self.callback_handler.callbacks.pop()  # Trainer's own progress, which it adds after the user's callbacks
        self.add_callback(self._phase)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        place = Path(str(args.output_dir)) if run is None else run.folder
        name = args.run_name or (place.name if run is None else run.recipe.get("name", place.name))
        lasting = place / "trackers" if run is None else place / "logs" / "trackers"
        replace_trackers(self, lasting / self.role, f"{name}-{self.role}", self._steps_before)
        if run is None:
            args.save_strategy = SaveStrategy.NO

    # ---- train and learn ----

    def train(
        self, resume_from_checkpoint: bool | str | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Learn the tasks of `train_dataset` in order, skipping those already learnt; steps restart in each task.

        With a run every task is measured (`evaluate_seen`) and stored, and an interrupted run resumes by itself. In
        the TrainOutput, `global_step` counts the steps of all tasks learnt in this call, and the loss is their mean.
        Raises ValueError, before anything is learnt, if one of the tasks cannot be.
        """
        check_train(resume_from_checkpoint, trial, ignore_keys_for_eval, self.run is not None)
        self.tasks = tasks_of(self.train_dataset)  # which may have been set since
        if not self.tasks:
            raise ValueError(
                "train() learns the tasks of train_dataset, but none was given. Give a TaskStream, as "
                "CDLTrainer(model, args, train_dataset=stream), or learn a single task: learn(stream[0])."
            )
        check_not_cut_off(self._cut_off, self.run, self.role)
        self.num_tasks = max(self.num_tasks or 0, self.tasks[-1].index + 1)
        to_learn = self.tasks[max(0, len(self.seen) - self.tasks[0].index) :]
        for task in to_learn:
            self._check_learnable(task)
        start, self._total = time.time(), Total()
        with gc_frozen():
            for task in to_learn:
                self.learn(task)
                if self.run is not None:
                    self.evaluate_seen()
        return self._total.output(start)

    def learn(self, task: Task) -> None:
        """Train on a task, unless the run has finished it or the model already knew it (`known_classes`).

        After an error or Ctrl-C in the middle, the trainer refuses to learn more, because its model has learnt only
        part of the task. To resume, create a new trainer with the same run and a newly loaded model.
        """
        check_tasks([task])
        check_not_cut_off(self._cut_off, self.run, self.role)
        check_order(task, self.seen)
        to_learn = self._check_learnable(task)
        self.seen.append(task)
        if to_learn:
            try:
                self._learn(task)
            except BaseException:
                self._cut_off = self.seen.pop()
                raise

    def _learn(self, task: Task) -> None:
        self._begin_task(task)
        self.model.trained_tasks = task.index + 1
        if self._load_from_other_run(task):
            return
        self._keep_settings()
        result, before = TaskResult(self.role, task.index), self._used()
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.state.log_history = []
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            self._train(task, result)
        if self.model.fitted:
            self._fit_head(task, result)
        self.model.end_task()
        self.objective.end_task()
        result.peak_memory_bytes = peak_memory(self.args.device)
        self._say_kept(result, before)
        self._store(result, task, self.state.log_history)

    def _check_learnable(self, task: Task) -> bool:
        """Whether a task is still to be learnt. Raises ValueError if it cannot be."""
        if self.model.fitted and self.model.head.needs_teacher and not self.teacher.teaches_head:
            raise ValueError("The head's soft_targets need a teacher, but none was given.")
        self._check_settings()
        done = self.run is not None and self.run.result(self.role, task) is not None
        if done or learnt_elsewhere(self.model, task):
            return False
        check_measured(self.run, self.role, self.seen)
        check_new(self.model, task)
        check_served(self.model, task)
        check_task(self.role, self.model, self.objective, self.args, task, self.teacher.model)
        self.check(task)
        self.teacher.check(task)
        return True

    def _load_from_other_run(self, task: Task) -> bool:
        """Load and save what another run learnt, if the recipe says so (`ROLE_from`); none of its files is copied."""
        found = None if self.run is None else self.run.taken(self.role, task)
        if self.run is None or found is None:
            return False
        checkpoint, result, history = found
        self.model.end_session()
        self.model.load_state_dict(type(self.model).from_pretrained(checkpoint).state_dict())
        self._store(result, task, history)
        return True

    # ---- one phase ----

    def _begin_task(self, task: Task) -> None:
        """Give the model its new task, initialised from (seed, role, task) alone."""
        known = self.model.tasks
        self._session = self.model.later_session(task.index)
        set_seed(zlib.crc32(f"{self.args.seed}/{self.role}/{task.index}".encode()))
        if len(known) == task.index:
            self.model.begin_task(task.class_names)
        elif len(known) != task.index + 1 or known[task.index] != list(task.class_names):
            raise ValueError(
                f"The model knows {counted(len(known), 'task')} {[len(names) for names in known]}, which does not fit "
                f"task {task.index + 1} with classes {list(task.class_names)[:5]} ... Load the last task's checkpoint."
            )
        if self.model.scaffold is not None and self.run is not None and task.index > self.run.origin.get("tasks", 0):
            load_scaffold(self.model.scaffold, self.run.scaffold_file(self.role, task.index - 1))
        self.teacher.begin_task(self.model)

    def _train(self, task: Task, result: TaskResult) -> None:
        last = self._stored_state(task)
        if last is None:
            self._measure(task)
        given, self.train_dataset = self.train_dataset, self._trained_on(task)
        self.optimizer = self.lr_scheduler = None  # new for every task and phase
        self.model_wrapped = self.model
        self._begin_counting()
        self._begin_callbacks()
        if last is not None:
            self._seconds_before = json.loads((Path(last) / "phase.json").read_text())["seconds"]
        self._kept.begin(task)
        self._read_kept(task)
        with compiled(self.args, self.model, self.teacher.model), self.teacher.phase(self.accelerator):
            try:
                start = time.perf_counter()
                metrics = super().train(resume_from_checkpoint=last).metrics
                self._check_losses()
                result.train_seconds = self._seconds_before + time.perf_counter() - start
                result.images_per_second = metrics["train_samples_per_second"]
                self._add_to_total()
            finally:  # take Accelerate's wrappers off again: they would pile up, task by task
                self._kept.flush()
                self._phase.close()
                close_trackers(self)  # an interrupted phase never reaches on_train_end
                self.model = unprepared(self.accelerator, self.model_wrapped)
                self.train_dataset = given

    def _trained_on(self, task: Task) -> Any:
        """The images of a task as they are trained on; beside unlabelled ones, if a term or `keep` reads these."""
        images = self._as_seen(task.train, task.classes, *self.teacher.views)
        held = self._session is not None and self._session.later.held[1]
        beside = task.unlabelled if self.objective.reads_unlabelled or held else None
        return images if beside is None else WithUnlabelled(images, beside, self.role, *self.teacher.views)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the objective on a batch: one query pass, one teacher pass without gradient, one student pass.

        `weight` in the inputs makes a step's gradient the mean over the images of all its micro-batches.
        """
        task, weight = self.seen[-1], inputs.get("weight", 1.0)
        batch = join_unlabelled(inputs)
        student, teacher = self._student_and_teacher(model, batch, task.index)
        losses = self.objective(student, teacher, inputs["labels"], task.classes)
        if self._session is not None:
            shown = (batch["pixel_values"], len(inputs["labels"]))
            losses = self._session.with_keep(losses, student, *shown, self.accelerator.autocast)
        self._note_losses(losses, weight)
        loss = weight * losses["loss"]
        return (loss, student) if return_outputs else loss

    # ---- files ----

    def _store(self, result: TaskResult, task: Task, history: list[dict[str, Any]]) -> None:
        """Store a learnt task, if there is a run to store it in."""
        if self.run is not None:
            with gathered(self.model, self.run.writer):
                self.run.save_task(result, task, self._write_checkpoint, history)
            self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, folder: Path) -> None:
        run: Any = self.run
        before = run.folder / self.role / revision_name(self.seen[-1].index)
        save_checkpoint(self.model, self.processing_class, folder, before)
        scaffold = self.model.scaffold
        if scaffold is not None:  # not part of the model's files, but needed to resume
            layers = {name: value.contiguous() for name, value in scaffold.state_dict().items()}
            write_whole(run.scaffold_file(self.role, self.seen[-1].index), lambda path: save_file(layers, path))

    # ---- methods of Trainer that are not supported ----

    hyperparameter_search = refused("hyperparameter_search")
    push_to_hub = refused("push_to_hub")
    create_model_card = refused("create_model_card")
    evaluation_loop = refused("evaluation_loop")
    prediction_step = refused("prediction_step")
