"""The dual-forward-path teacher: it starts equal to the teacher, is trained alongside it, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_contract import CLASSES, METHODS, arguments, images, model_of, newcomer, pair_of, stream, value
from torch import nn
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_cdl import CDLForImageClassification, CDLTrainer
from hf_cdl.distill import TERMS, Objective
from hf_cdl.distill.dual_path import DualPath, DualPathConfig
from hf_cdl.distill.kd import KD, KDConfig
from hf_cdl.distill.prompt_blocks import MapBlock, PartialConv, TokenBlock
from hf_cdl.distill.stages import find_stages, token_grid
from hf_cdl.runs.run import Run
from hf_cdl.types import CDLOutput, ModelShape

SHAPE = ModelShape(8, 3)
SIDE, LABELS = 64, torch.tensor([0, 3, 1, 2, 4, 0])
DEPTHS: dict[str, Any] = {"depths": [1, 1, 1, 1], "num_labels": 5}
NETS: dict[str, Any] = {**DEPTHS, "embedding_size": 8}
VITS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
    "patch_size": 16,
    "num_labels": 5,
    "initializer_range": 0.2,
}
MOBILE: dict[str, Any] = {"num_labels": 5}
SWIN: dict[str, Any] = {"depths": [1, 1, 2, 1], "num_heads": [2, 2, 2, 2], "window_size": 2, "num_labels": 5}
# Name -> a tiny random classifier and the number of modules of each of its stages.
FAMILIES: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "resnet": (
        lambda: ResNetForImageClassification(ResNetConfig(hidden_sizes=[8, 12, 16, 20], layer_type="basic", **NETS)),
        [1, 1, 1, 1],
    ),
    "regnet": (
        lambda: RegNetForImageClassification(RegNetConfig(hidden_sizes=[8, 16, 24, 32], groups_width=4, **NETS)),
        [1, 1, 1, 1],
    ),
    "convnext": (
        lambda: ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[8, 12, 16, 20], image_size=SIDE, **DEPTHS)
        ),
        [1, 1, 1, 1],
    ),
    "mobilenet_v2": (
        lambda: MobileNetV2ForImageClassification(
            MobileNetV2Config(depth_multiplier=0.25, min_depth=4, image_size=SIDE, **MOBILE)
        ),
        [2, 3, 7, 4],
    ),
    "swin": (
        lambda: SwinForImageClassification(SwinConfig(image_size=SIDE, patch_size=4, embed_dim=8, **SWIN)),
        [1, 1, 1, 1],
    ),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**VITS)), [2, 1, 1, 2]),
    "deit": (lambda: DeiTForImageClassification(DeiTConfig(**VITS)), [2, 1, 1, 2]),
    "dinov2": (lambda: Dinov2ForImageClassification(Dinov2Config(**VITS)), [2, 1, 1, 2]),
    "dinov2_with_registers": (
        lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**VITS)),
        [2, 1, 1, 2],
    ),
}
__all__ = ["newcomer"]  # a fixture that every test here uses


def classifier(family: str) -> Any:
    """A tiny random classifier whose batch norm statistics are those of some images."""
    set_seed(0)
    model = FAMILIES[family][0]()
    with torch.no_grad():
        model.train()(pixels(9))
    return model.eval()


def pixels(seed: int = 0, count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def term_of(teacher: Any = None, **fields: Any) -> DualPath:
    set_seed(1)
    term = DualPath(DualPathConfig(**fields), SHAPE, SHAPE)
    if teacher is not None:
        term.attach(teacher)
        term.begin_task(teacher)
    return term


def ask(term: DualPath, teacher: Any, seed: int = 0, **inputs: Any) -> CDLOutput:
    """Do what the trainer does: the teacher's own path without gradients, then the term's path."""
    asked = {"pixel_values": pixels(seed), **inputs}
    with torch.no_grad():
        found = teacher(**asked)
    answer = found if isinstance(found, CDLOutput) else CDLOutput(logits=found.logits)
    return term.consult(answer, asked)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# ---- every family ----


@pytest.mark.parametrize("copy_from", [None, "first_prompt", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_path_begins_as_the_teacher_and_trains_without_touching_it(family: str, copy_from: Any) -> None:
    teacher = classifier(family)
    before = state(teacher)
    asks_gradient = {name: p.requires_grad for name, p in teacher.named_parameters()}
    term = term_of(teacher, head_init="teacher", copy_from=copy_from, lambda_y=0.5)
    sizes = FAMILIES[family][1]
    assert [len(stage.modules) for stage in find_stages(teacher).stages] == sizes
    assert [*term.prompts] == [str(number) for number in range(1, len(sizes))]
    copies = {None: 0, "first_prompt": sum(sizes[1:]), "all": 1 + sum(sizes)}[copy_from]
    assert len(term.copied) == copies

    answer = ask(term.eval(), teacher)
    assert answer.path_logits is not None and answer.path_logits.std() > 1e-3
    torch.testing.assert_close(answer.path_logits, answer.logits, atol=1e-5, rtol=0)

    term.train()
    student = nn.Linear(3, 5)
    trained = {name: p for name, p in term.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"prompts", "head"} | ({"copied"} if copies else set())
    frozen = {name for name, p in term.named_parameters() if not p.requires_grad}
    assert all("mask_token" in name for name in frozen)
    optimizer = torch.optim.SGD([*trained.values(), *student.parameters()], lr=0.1)
    for step in range(2):
        answer = ask(term, teacher, step)
        optimizer.zero_grad()
        value(term, CDLOutput(logits=student(pixels(step).mean(dim=(2, 3)))), answer, LABELS).backward()
        optimizer.step()
    for name, parameter in trained.items():
        assert parameter.grad is not None, f"{name}: an unused parameter stops distributed training"
        assert not name.startswith("prompts") or parameter.grad.abs().sum() > 0, f"{name} gets no gradient"
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    moved = ask(term.eval(), teacher)
    assert moved.path_logits is not None and (moved.path_logits - moved.logits).abs().max() > 1e-4
    assert same(before, teacher.state_dict()), "weights or statistics of the frozen teacher moved"
    assert all(p.grad is None for p in teacher.parameters())
    assert {name: p.requires_grad for name, p in teacher.named_parameters()} == asks_gradient
    modes = [module.training for module in teacher.modules()]
    assert not any(modes)


def test_only_copied_batch_norms_are_in_training_mode_and_their_statistics_move() -> None:
    teacher = classifier("resnet")
    term = term_of(teacher, copy_from="all").train()
    training = [type(module) for module in term.copied.modules() if module.training]
    assert set(training) == {nn.BatchNorm2d}
    before = state(term.copied)
    ask(term, teacher)
    moved = {name for name, value in term.copied.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "running" in name or "num_batches" in name}
    swin = term_of(classifier("swin"), copy_from="all").train()
    assert not any(module.training for module in swin.copied.modules()), "stochastic depth must stay off"


def test_a_last_batch_of_one_image_with_maps_of_one_pixel_is_learnt_too() -> None:
    """By running statistics, which it does not change; the next batch updates them again."""
    teacher = classifier("mobilenet_v2")
    term = term_of(teacher, copy_from="all").train()
    norms = {name: module for name, module in term.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name.split(".")[0] for name in norms} == {"prompts", "copied"}
    maps: set[tuple[int, ...]] = set()
    for block in term.prompts.values():
        block.register_forward_hook(lambda module, args, output: maps.add(tuple(output.shape[2:])))
    for count in (1, 6):
        before = state(term)
        with torch.no_grad():
            answer = teacher(pixel_values=pixels(count=count)[:, :, :16, :16])
        answer = term.consult(CDLOutput(logits=answer.logits), {"pixel_values": pixels(count=count)[:, :, :16, :16]})
        value(term, CDLOutput(logits=torch.zeros(count, 5)), answer, LABELS[:count]).backward()
        moved = {name for name, tensor in term.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == {f"{name}.{key}" for name in norms for key in norms[name]._buffers if count > 1}
    assert (1, 1) in maps
    assert all(p.grad is not None for p in term.parameters() if p.requires_grad)


def test_what_lies_before_the_first_block_is_computed_once() -> None:
    teacher = classifier("vit")
    kind = type(teacher.vit.layers[0].attention)
    cases: list[tuple[dict[str, Any], int]] = [({}, 4), ({"insert_after": (3,)}, 2), ({"copy_from": "all"}, 6)]
    for fields, want in cases:
        term = term_of(teacher, head_init="teacher", **fields)
        calls: list[str] = []

        def count(module: nn.Module, *_: Any, calls: list[str] = calls) -> None:
            calls.extend(["attention"] * isinstance(module, kind))

        handle = nn.modules.module.register_module_forward_hook(count)
        answer = ask(term, teacher)
        handle.remove()
        term.end_task()
        assert len(calls) == 6 + want, fields
        assert answer.path_logits is not None
        torch.testing.assert_close(answer.path_logits, answer.logits, atol=1e-5, rtol=0)
    assert not any(module._forward_hooks for module in teacher.vit.layers), "the teacher is let go of"


@pytest.mark.parametrize("query", ["student", "self", "one_pass"])
@pytest.mark.parametrize("method", METHODS)
def test_a_continual_teacher_s_prompts_act_on_both_paths(method: str, query: str) -> None:
    teacher, _ = pair_of(method, "dual_path", query)
    for names in CLASSES:
        teacher.begin_task(names)
    teacher.eval()
    term = term_of(teacher, head_init="teacher")
    passes: list[int] = []
    path: Any = term._path[0]
    for backbone in (path.backbone, path.query_backbone):
        if backbone is not None:
            backbone.register_forward_hook(lambda *_: passes.append(1))
    answer = ask(term, teacher, pixel_values=images(), task_id=1)
    assert len(passes) == 1, "the query was known already"
    torch.testing.assert_close(answer.path_logits, answer.logits, atol=1e-5, rtol=0)
    bare = teacher.head(teacher._run(teacher.backbone, images()).last_hidden_state[:, 0])
    assert answer.path_logits is not None and (answer.path_logits - bare).abs().max() > 1e-3
    trained = {name for name, p in term.named_parameters() if p.requires_grad and name.startswith("head")}
    assert trained == {"head.blocks.1.weight", "head.blocks.1.bias"}


# ---- losses ----


def logits(seed: int, grad: bool = False) -> torch.Tensor:
    return (torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * 2).requires_grad_(grad)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_free_logits_of_the_prompt_path_become_the_mixture_of_teacher_and_student(rho: float) -> None:
    term = term_of(rho=rho, temperature=3.0, beta_o=0, beta_p=0)
    original, student, free = logits(1), logits(2), logits(3, grad=True)
    optimizer = torch.optim.LBFGS([free], lr=1, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = value(term, CDLOutput(logits=student), CDLOutput(logits=original, path_logits=free), LABELS)
        found.backward()
        return found

    optimizer.step(loss)  # type: ignore[arg-type]  # a tensor suffices
    soft = [F.softmax(z / 3, dim=1) for z in (original, student, free.detach())]
    torch.testing.assert_close(soft[2], (1 - rho) * soft[0] + rho * soft[1], atol=1e-3, rtol=0)


def test_without_the_prompt_path_s_weight_the_student_learns_as_with_kd() -> None:
    path = logits(4, grad=True)
    teacher = CDLOutput(logits=logits(1), path_logits=path)
    kd = KD(KDConfig(weight=0.9, temperature=4.0), SHAPE, SHAPE)
    found = []
    for term in (kd, term_of(beta_o=0.9, beta_p=0.0), term_of(beta_o=0.0, beta_p=0.0)):
        ours = logits(2, grad=True)
        losses = Objective(0.1, [("it", term)])(CDLOutput(logits=ours), teacher, LABELS, slice(0, 5))
        losses["loss"].backward()
        found.append((losses, ours.grad))
    (as_kd, kd_gradient), (both, gradient), (tuning, alone) = found
    assert torch.equal(gradient, kd_gradient) and not torch.equal(alone, gradient)
    assert torch.equal(both["it/student"], 0.9 * as_kd["it"]) and tuning["it/student"] == 0
    assert torch.equal(both["it/prompt_path"], tuning["it/prompt_path"]) and both["it/prompt_path"] > 0
    assert path.grad is not None and path.grad.abs().sum() > 0


def test_the_student_s_loss_and_the_prompt_path_s_are_named_and_add_up() -> None:
    """Each of them trains only its own side, and the term's weight applies to both."""
    ours, path = logits(2, grad=True), logits(4, grad=True)
    objective = Objective(0.0, [("dual_path", term_of(weight=0.5, lambda_y=0.3))])
    losses = objective(CDLOutput(logits=ours), CDLOutput(logits=logits(1), path_logits=path), LABELS, slice(0, 5))
    assert [*losses] == ["loss", "ce", "dual_path/student", "dual_path/prompt_path", "dual_path"]
    parts = losses["dual_path/student"], losses["dual_path/prompt_path"]
    assert torch.equal(parts[0] + parts[1], losses["dual_path"]) and losses["loss"] == 0.5 * losses["dual_path"]
    for part, (own, other) in zip(parts, [(ours, path), (path, ours)], strict=True):
        gradients = torch.autograd.grad(part, [own, other], allow_unused=True, retain_graph=True)
        assert gradients[0].abs().sum() > 0 and gradients[1] is None


def test_a_student_with_a_kd_head_learns_both_paths_with_it() -> None:
    ours, kd, path = logits(1, grad=True), logits(2, grad=True), logits(3, grad=True)
    teacher = CDLOutput(logits=logits(4), path_logits=path)
    plain = value(term_of(), CDLOutput(logits=kd), teacher, LABELS)
    both = value(term_of(), CDLOutput(logits=ours, kd_logits=kd), teacher, LABELS)
    assert plain == both
    assert torch.autograd.grad(both, [ours, kd], allow_unused=True)[0] is None


def test_only_the_current_task_s_classes_are_compared() -> None:
    path, original, ours = logits(1, grad=True), logits(2), logits(3, grad=True)
    objective = Objective(0.5, [("dual_path", term_of(lambda_y=0.5))])
    losses = objective(
        CDLOutput(logits=ours), CDLOutput(logits=original, path_logits=path), LABELS % 2 + 2, slice(2, 4)
    )
    losses["loss"].backward()
    for tensor in (path, ours):
        assert tensor.grad is not None
        assert tensor.grad[:, [0, 1, 4]].abs().sum() == 0 and (tensor.grad[:, 2:4] != 0).all()


def test_the_prompt_path_s_weight_grows_and_the_teacher_s_gives_way() -> None:
    """It changes with optimizer steps: all micro-batches of a step have the same weights."""
    term, found = term_of(beta_o=0.2, beta_p=0.4, warmup_steps=4), []
    for _ in range(6):
        term.begin_step()
        found.append(tuple(map(float, term._betas())))
        assert tuple(map(float, term._betas())) == found[-1]
    want = [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]
    assert [beta_p for _, beta_p in found] == pytest.approx(want)
    assert [sum(pair) for pair in found] == pytest.approx([0.6] * 6)


# ---- blocks and stages ----


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_a_partial_convolution_is_a_dense_one_with_zero_blocks(kernel: int) -> None:
    partial = PartialConv(2, kernel)
    dense = nn.Conv2d(8, 8, kernel, padding=kernel // 2, bias=False)
    with torch.no_grad():
        dense.weight.zero_()
        dense.weight[:2, :2] = partial.conv.weight
        dense.weight[range(2, 8), range(2, 8), kernel // 2, kernel // 2] = 1  # the others pass
    x = torch.randn(3, 8, 9, 6)
    torch.testing.assert_close(partial(x), dense(x))


def test_blocks_begin_as_the_identity_and_have_the_sizes_of_the_specification() -> None:
    maps, tokens = MapBlock(64, 4, 0.25, (3, 5, 7)), TokenBlock(96, 8, 0.25, (3, 5), extra=True)
    x, y = torch.randn(2, 64, 5, 3), torch.randn(2, 7, 96)
    assert torch.equal(maps(x), x)
    assert torch.equal(tokens(y, (32, 48), (16, 16)), y)
    kernels = [(m.conv.in_channels, m.conv.kernel_size[0]) for m in maps.mix if isinstance(m, PartialConv)]
    assert kernels == [(4, 3), (4, 5), (4, 7)]  # 64 / 4 = 16 channels, a quarter of them
    assert [(m.conv.in_channels, m.conv.kernel_size[0]) for m in tokens.mix if isinstance(m, PartialConv)] == [
        (3, 3),
        (3, 5),
    ]


def test_a_token_block_mixes_patches_with_their_neighbours_on_the_grid() -> None:
    set_seed(0)
    block = TokenBlock(16, 1, 1.0, (3,), extra=False)
    block.up.load_state_dict({"weight": torch.randn(16, 16), "bias": torch.zeros(16)})
    x = torch.randn(1, 24, 16, requires_grad=True)  # 4 x 6 patches
    block(x, (64, 96), (16, 16))[0, 8].sum().backward()  # row 1, column 2
    assert x.grad is not None
    seen = x.grad[0].abs().sum(dim=1).reshape(4, 6) > 0
    assert seen.nonzero().tolist() == [[row, column] for row in range(3) for column in range(1, 4)]


def test_the_grid_is_found_among_other_tokens() -> None:
    assert token_grid(17, (64, 64), (16, 16)) == (4, 4)
    assert token_grid(2 * 3 + 5, (28, 42), (14, 14)) == (2, 3)  # five registers and CLS
    assert token_grid(9, (20, 20), (4, 4)) == (3, 3)  # 5 x 5 patches, merged by twos


def test_a_teacher_without_plain_stages_needs_named_ones_and_errors_list_what_was_found() -> None:
    class Net(ResNetForImageClassification):
        def __init__(self, config: ResNetConfig):
            super().__init__(config)
            self.resnet.more = nn.ModuleList([nn.Identity(), nn.Identity()])

    set_seed(0)
    net = Net(ResNetConfig(hidden_sizes=[8, 12, 16, 20], layer_type="basic", **NETS)).eval()
    lists = r"resnet.encoder.stages.0 to resnet.encoder.stages.3 \(4\); resnet.more.0 to resnet.more.1 \(2\)"
    with pytest.raises(ValueError, match=rf"not plain. Name its stages .* found: {lists}"):
        find_stages(net)
    with pytest.raises(ValueError, match=rf"no module 'resnet.stage1'.*{lists}"):
        find_stages(net, ["resnet.stage1", "resnet.encoder.stages.3"])
    with pytest.raises(ValueError, match=r"neither a map .* classifier: None"):
        find_stages(net, ["resnet.encoder.stages.0", "classifier"])
    named = ["resnet.encoder.stages.0", "resnet.encoder.stages.1.layers.0", "resnet.encoder.stages.3"]
    term = term_of(net, head_init="teacher", stages=tuple(named), copy_from="all").eval()
    answer = ask(term, net)
    assert [*term.prompts] == ["1", "2"] and len(term.copied) == 1 + 3
    torch.testing.assert_close(answer.path_logits, answer.logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"insert_after is \[4\].*1 \(up to resnet.encoder.stages.0\), 2 "):
        term_of(net, stages=tuple(named), insert_after=(4,))


def test_impossible_settings_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"rho": 1.5},
        {"temperature": 0},
        {"beta_p": -1},
        {"kernels": (4,)},
        {"fraction": 0},
        {"reduction": 0},
        {"insert_after": ()},
    ]
    for fields in wrong:
        with pytest.raises(ValueError, match="dual_path needs"):
            DualPathConfig(**fields)
    with pytest.raises(ValueError, match="dual_path, dual_path each put a path"):
        Objective(0.5, [("dual_path", term_of()), ("dual_path", term_of())])


# ---- in the trainer ----


class Wrapped(nn.Module):
    """A convolutional teacher wrapped for the trainer: its classes are all those of the stream."""

    needs_query = False
    shape = ModelShape(0, 0)

    def __init__(self) -> None:
        super().__init__()
        self.model = classifier("resnet")

    def forward(
        self, pixel_values: torch.Tensor, query: Any = None, task_id: int = 0, output_hidden_states: Any = None
    ) -> CDLOutput:
        return CDLOutput(logits=self.model(pixel_values=pixel_values).logits)


def trainer_of(
    folder: Path,
    run: Run | None = None,
    student: Any = None,
    term: str = "dual_path",
    convolutional: bool = False,
    train: dict[str, Any] | None = None,
    **fields: Any,
) -> Any:
    """A student and a teacher that knows both tasks."""
    set_seed(0)
    student = model_of("coda", width=32) if student is None else student
    teacher: Any = Wrapped() if convolutional else model_of("coda", width=48)
    if not convolutional:
        for task in stream():
            teacher.begin_task(task.class_names)
    kind = TERMS[term]
    objective = Objective(0.5, [(term, kind(kind.config_class(**fields), student.shape, teacher.shape))])
    args = arguments(folder, num_train_epochs=2, save_strategy="epoch", **(train or {}))
    return CDLTrainer(student, args, objective=objective, teacher=teacher, run=run)


PLUS: dict[str, Any] = {"copy_from": "all", "head_init": "teacher", "warmup_steps": 3}
CONVOLUTIONAL: dict[str, Any] = {**PLUS, "convolutional": True}  # batch norms in blocks and copies


def test_kd_and_dual_path_without_the_prompt_path_train_the_same_student(tmp_path: Path) -> None:
    task = next(stream())
    kd = trainer_of(tmp_path / "kd", term="kd", weight=0.9, temperature=4.0)
    dual = trainer_of(tmp_path / "dual", beta_o=0.9, beta_p=0.0, copy_from="all")
    for trainer in (kd, dual):
        trainer.learn(task)
    got = dual.model.state_dict()
    assert all(torch.equal(tensor, got[name]) for name, tensor in kd.model.state_dict().items())
    first = dual.state.log_history[0]
    logged = {name.removeprefix("loss/"): value for name, value in first.items() if "dual_path" in name}
    assert logged.keys() == {"dual_path", "dual_path/student", "dual_path/prompt_path"}
    assert logged["dual_path"] == pytest.approx(logged["dual_path/student"] + logged["dual_path/prompt_path"])


@pytest.mark.parametrize("fields", [PLUS, CONVOLUTIONAL], ids=["vit", "resnet"])
def test_accuracies_over_training_are_measured_without_a_trace(fields: dict[str, Any], tmp_path: Path) -> None:
    """For student, original path and prompt path, after every epoch; the resulting weights are the same."""
    plain = trainer_of(tmp_path / "plain", **fields)
    watched = trainer_of(tmp_path / "watched", train={"eval_strategy": "epoch"}, **fields)
    task = next(stream())
    for trainer in (plain, watched):
        trainer.learn(task)
    got = watched.model.state_dict()
    assert all(torch.equal(value, got[name]) for name, value in plain.model.state_dict().items())
    curve = [entry for entry in watched.state.log_history if "eval_accuracy" in entry]
    assert [entry["epoch"] for entry in curve] == [1.0, 2.0]
    assert curve[-1]["eval_accuracy"] == watched.evaluate_seen().row[0]
    right = [0, 0]
    for batch in watched.get_test_dataloader(task.test):
        with torch.no_grad():
            own = watched.teacher.model.eval()(pixel_values=batch["pixel_values"]).logits[:, task.classes]
        right = [right[0] + int((own.argmax(-1) == batch["labels"]).sum()), right[1] + len(own)]
    original = 100 * right[0] / right[1]
    assert all(entry["eval_teacher_accuracy"] == pytest.approx(original) for entry in curve)
    assert all(0 <= entry["eval_prompt_path_accuracy"] <= 100 for entry in curve)


@pytest.mark.parametrize("fields", [PLUS, CONVOLUTIONAL], ids=["vit", "resnet"])
def test_copied_stages_are_a_group_of_their_own_and_the_teacher_stays(fields: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, **fields)
    before = state(trainer.teacher.model)
    seen: dict[str, Any] = {}
    plain = trainer.compute_loss

    def watching(*args: Any, **kwargs: Any) -> Any:
        term = trainer.objective.terms["dual_path"]
        seen["groups"] = [(group["lr"], {*map(id, group["params"])}) for group in trainer.optimizer.param_groups]
        seen["copied"] = {*map(id, term.copied.parameters())}
        seen["all"] = [id(p) for p in trainer.model.parameters() if p.requires_grad]
        seen["parts"] = {name.split(".")[3] for name, _ in trainer.model.scaffold.named_parameters("x")}
        return plain(*args, **kwargs)

    trainer.compute_loss = watching
    for task in stream():
        trainer.learn(task)
        assert {*seen["all"]} == {key for _, keys in seen["groups"] for key in keys}
        assert len(seen["all"]) == sum(len(keys) for _, keys in seen["groups"])
        for rate, keys in seen["groups"]:
            assert rate == pytest.approx(0.001 if keys & seen["copied"] else 0.01)
            assert not keys & seen["copied"] or keys <= seen["copied"]
        assert seen["parts"] == {"prompts", "head", "copied"}
        assert same(before, trainer.teacher.model.state_dict())
    assert all(
        name.split(".")[3] in ("prompts", "batches") for name in trainer.model.state_dict() if "scaffold" in name
    )


@pytest.mark.parametrize("fields", [PLUS, CONVOLUTIONAL], ids=["vit", "resnet"])
def test_blocks_stay_warm_for_the_next_task_and_out_of_the_student_s_files(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    first, second = stream()
    whole = trainer_of(tmp_path, Run(tmp_path / "whole", {}), **fields)
    whole.learn(first)
    whole.evaluate_seen()
    whole.learn(second)

    cut = trainer_of(tmp_path, Run(tmp_path / "cut", {}), **fields)
    start = state(cut.objective)
    cut.learn(first)
    assert not same(start, cut.objective.state_dict())
    folder: Any = cut.run.checkpoint("student")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not any("scaffold" in name or "dual_path" in name for name in file.keys())  # noqa: SIM118
    assert same(CDLForImageClassification.from_pretrained(folder).state_dict(), bare(cut.model))

    # A new process between the tasks: the student from its files, the blocks initialised again, then restored.
    student = CDLForImageClassification.from_pretrained(folder)
    resumed = trainer_of(tmp_path, cut.run, student=student, **fields)
    with torch.no_grad():
        for value in resumed.objective.state_dict().values():
            value.zero_()
    resumed.learn(first)
    resumed.evaluate_seen()
    resumed.learn(second)
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def bare(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("scaffold.")}


@pytest.mark.parametrize("fields", [PLUS, CONVOLUTIONAL, {"copy_from": "first_prompt"}, {"copy_from": None}])
def test_a_phase_that_was_cut_off_goes_on_with_its_prompt_path(tmp_path: Path, fields: dict[str, Any]) -> None:
    task = next(stream())
    whole = trainer_of(tmp_path, Run(tmp_path / "whole", {}), **fields)
    whole.learn(task)

    class Stop(Exception):
        pass

    cut = trainer_of(tmp_path, Run(tmp_path / "cut", {}), **fields)
    plain = cut.compute_loss

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if cut.state.global_step == 4:
            raise Stop
        return plain(*args, **kwargs)

    cut.compute_loss = stopping
    with pytest.raises(Stop):
        cut.learn(task)
    resumed = trainer_of(tmp_path, cut.run, **fields)
    resumed.learn(task)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
