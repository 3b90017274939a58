"""Wins accuracy of a converted model back: it learns to reproduce the dense one, layer by layer, then as a whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from infold.activations import Batch, Forward, call, capture, without_padding
from infold.layers import dense_kind
from infold.recovery import LayerRecovery, Measurement, RecoveryConfig, RecoveryReport, Stage, Stopped

Loss = Callable[[Tensor, Tensor], Tensor]


def relative_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖², in float32 or float64."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    return (student - teacher).square().sum() / teacher.square().sum()


@torch.inference_mode(False)
@torch.enable_grad()
def recover(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    config: RecoveryConfig | None = None,
    *,
    held_out: Sequence[Batch] | None = None,
    forward: Forward = call,
    loss: Loss = relative_squared_error,
    progress: bool = True,
) -> RecoveryReport:
    """Trains the converted layers of ``model``, in place, to do what ``teacher`` does.

    First each converted layer by itself learns the teacher's output from the model's own input (or the teacher's); then
    all of them learn the teacher's final output. Both stages measure themselves on held-out batches. The model is left
    in the state of the least held-out loss that was measured, and as it was if none was less; so also after an
    exception or an interrupt. To go on, call it again.

    model: a model some of whose layers have been converted, on one device; those of a type other than their namesake's
        in the teacher count. What is frozen by its form (a log8 spectrum, packed integers) does not train.
    teacher: the dense model. It is only read.
    batches: what a model is called with, see `call`; all are kept in memory.
    config: budget and manner.
    held_out: batches to measure with; by default the last fifth of ``batches``, one at least. Their targets are kept.
    forward: ``forward(model, batch)`` gives the output to reproduce, for models that `call` does not fit.
    loss: ``loss(student's output, teacher's output)`` gives a scalar to make small, 0 at best. The mean over held-out
        batches is what the report states.

    Both models run in eval mode (no dropout) and get their mode back. Raises ValueError where no layer differs from the
    teacher's, none of their parameters can train or they are the teacher's too, for fewer than two batches, and for a
    loss that is not finite at the start.
    """
    config = config or RecoveryConfig()
    layers = _converted_layers(model, teacher)
    training = list(batches)
    if held_out is None:
        if len(training) < 2:
            raise ValueError(
                f"batches: expected two or more, some to learn from and some to measure, got {len(training)}"
            )
        split = min(len(training) - 1, math.ceil(0.8 * len(training)))
        training, held_out = training[:split], training[split:]
    if not training or not held_out:
        raise ValueError("batches: expected some to learn from and some to measure with, got none of one kind")
    trained = _floats(layer for layer in layers.values())
    if config.parameters == "all":
        trained += [p for p in _floats([model]) if p.requires_grad and all(p is not other for other in trained)]
    if not trained:
        raise ValueError("model: expected converted layers with float parameters, got frozen ones only")
    if {id(p) for p in trained} & {id(p) for p in teacher.parameters()}:
        raise ValueError("teacher: expected parameters of its own, got some that the model would train (copy it first)")

    with evaluating(model, teacher), _requiring(model, trained):
        run = _Run(model, teacher, training, held_out, config, forward, loss, trained, progress)
        try:
            if config.layer_steps:
                run.layer_by_layer(layers)
            if config.steps:
                run.end_to_end()
        finally:
            run.finish()
    return run.report


class _Best:
    """The best state of some parameters, by a measure that is to be small."""

    def __init__(self, parameters: Sequence[Tensor], measure: float) -> None:
        self.parameters = parameters
        self.measure = measure
        self.state = [parameter.detach().clone() for parameter in parameters]
        self.misses = 0

    def offer(self, measure: float) -> None:
        if measure < self.measure:
            self.measure, self.misses = measure, 0
            for kept, parameter in zip(self.state, self.parameters, strict=True):
                kept.copy_(parameter.detach())
        else:
            self.misses += 1

    @torch.no_grad()
    def restore(self) -> None:
        for kept, parameter in zip(self.state, self.parameters, strict=True):
            parameter.copy_(kept)


class _Run:
    """One recovery."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        training: Sequence[Batch],
        held_out: Sequence[Batch],
        config: RecoveryConfig,
        forward: Forward,
        loss: Loss,
        trained: list[nn.Parameter],
        progress: bool,
    ) -> None:
        self.model, self.teacher, self.training, self.held_out = model, teacher, training, held_out
        self.config, self.forward, self.loss, self.trained, self.progress = config, forward, loss, trained, progress
        self.generator = torch.Generator().manual_seed(config.seed)
        self.begin = time.perf_counter()
        self.report = RecoveryReport()
        with torch.no_grad():
            self.targets = [forward(teacher, batch) for batch in held_out]
        start = self._measure("start", 0)
        if not math.isfinite(start):
            raise ValueError(f"loss: expected a finite one at the start, got {start}")
        self.report.loss_before = start
        self.best = _Best(trained, start)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.begin

    @torch.no_grad()
    def _measure(self, stage: Stage, step: int, training_loss: float | None = None) -> float:
        losses = [
            float(self.loss(self.forward(self.model, batch), target))
            for batch, target in zip(self.held_out, self.targets, strict=True)
        ]
        mean = sum(losses) / len(losses)
        self.report.history.append(Measurement(stage, step, self.elapsed, mean, training_loss))
        return mean

    def layer_by_layer(self, layers: Mapping[str, nn.Module]) -> None:
        """Every layer for itself, in the model's order."""
        end = None if self.config.seconds is None else self.config.seconds / 2
        with tqdm(layers.items(), desc="layers", unit="layer", disable=not self.progress, leave=False) as bar:
            for index, (name, layer) in enumerate(bar):
                if end is not None and self.elapsed >= end:
                    break
                parameters = _floats([layer])
                if parameters:
                    # What is left of the time, in equal parts.
                    share = None if end is None else self.elapsed + (end - self.elapsed) / (len(layers) - index)
                    self.report.layers.append(self._fit(name, layer, parameters, share))
                    bar.set_postfix_str(f"{name} {self.report.layers[-1].error_after:.3g}", refresh=False)
        # The next stage begins here even where this is worse: errors that add up along the model are its to mend.
        self.best.offer(self._measure("layers", 0))

    def _fit(self, name: str, layer: nn.Module, parameters: list[nn.Parameter], end: float | None) -> LayerRecovery:
        config = self.config
        x, y = self._activations(name, self.training, config.layer_rows)
        held_x, held_y = self._activations(name, self.held_out, max(config.layer_rows // 4, 1))

        @torch.no_grad()
        def error() -> float:
            return math.sqrt(float(relative_squared_error(layer(held_x), held_y)))

        def train() -> Tensor:
            rows = torch.randint(len(x), (min(config.layer_batch, len(x)),), generator=self.generator).to(x.device)
            return relative_squared_error(layer(x[rows]), y[rows])

        best = _Best(parameters, error())
        before = best.measure
        steps, stopped = self._train(
            parameters, config.layer_steps, config.layer_rate, train, lambda step, loss: error(), best, end, None
        )
        return LayerRecovery(name, before, best.measure, steps, stopped)

    @torch.no_grad()
    def _activations(self, name: str, batches: Sequence[Batch], rows: int) -> tuple[Tensor, Tensor]:
        """(input of the layer, output of the teacher's) as (rows, features) each, of as many batches as it takes."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        while sum(len(x) for x in inputs) < rows and len(inputs) < len(batches):
            batch = batches[len(inputs)]
            x, y = capture(self.forward, self.teacher, name, batch)
            if self.config.inputs == "student":
                x, _ = capture(self.forward, self.model, name, batch)
            inputs.append(without_padding(x, batch).reshape(-1, x.shape[-1]))
            outputs.append(without_padding(y, batch).reshape(-1, y.shape[-1]))
        return torch.cat(inputs)[:rows], torch.cat(outputs)[:rows]

    def end_to_end(self) -> None:
        """The whole model by its output."""
        order: Iterator[int] = iter(())

        def train() -> Tensor:
            nonlocal order
            index = next(order, None)
            if index is None:
                order = iter(torch.randperm(len(self.training), generator=self.generator).tolist())
                index = next(order)
            batch = self.training[index]
            with torch.no_grad():
                target = self.forward(self.teacher, batch)
            return self.loss(self.forward(self.model, batch), target)

        def measure(step: int, training_loss: float) -> float:
            return self._measure("end to end", step, training_loss)

        self.best.misses = 0
        with tqdm(total=self.config.steps, desc="end to end", disable=not self.progress, leave=False) as bar:
            self.report.steps, self.report.stopped = self._train(
                self.trained, self.config.steps, self.config.rate, train, measure, self.best, self.config.seconds, bar
            )

    def _train(
        self,
        parameters: list[nn.Parameter],
        steps: int,
        rate: float,
        train: Callable[[], Tensor],
        measure: Callable[[int, float], float],
        best: _Best,
        end: float | None,
        bar: tqdm | None,
    ) -> tuple[int, Stopped]:
        """Adam on ``train()``'s loss until something ends it: after how many steps, and what. Leaves the best state."""
        optimizer = torch.optim.Adam(parameters, lr=rate)
        begin = self.elapsed
        losses: list[float] = []
        stopped: Stopped = "steps"
        step = 0
        while step < steps:
            used = 0.0 if end is None else (self.elapsed - begin) / max(end - begin, 1e-9)
            if used >= 1:
                stopped = "seconds"
                break
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * max(step / steps, used))) / 2
            loss = train()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                stopped = "not finite"
                break
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
            ):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            if bar is not None:
                bar.update()
            if step * self.config.evaluations // steps > (step - 1) * self.config.evaluations // steps:
                best.offer(measure(step, sum(losses) / len(losses)))
                losses = []
                if bar is not None:
                    bar.set_postfix_str(f"held-out loss {best.measure:.3g}", refresh=False)
                if best.misses >= self.config.patience and step < steps:
                    stopped = "patience"
                    break
        if stopped == "seconds" and losses:
            best.offer(measure(step, sum(losses) / len(losses)))
        best.restore()
        return step, stopped

    def finish(self) -> None:
        self.best.restore()
        self.report.loss_after = self.best.measure
        self.report.seconds = self.elapsed


def _converted_layers(model: nn.Module, teacher: nn.Module) -> dict[str, nn.Module]:
    """The modules that take the place of the teacher's linear layers, shared ones once."""
    dense = {name: module for name, module in teacher.named_modules() if dense_kind(module) == "linear"}
    layers = {
        name: module
        for name, module in model.named_modules()
        if name in dense and type(module) is not type(dense[name])
    }
    if not layers:
        raise ValueError("model: expected layers that take the place of the teacher's linear ones, got none")
    return layers


def _floats(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that can train, each once."""
    parameters = {id(p): p for module in modules for p in module.parameters() if p.is_floating_point()}
    return list(parameters.values())


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode, each module afterwards in the one that it was in."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _requiring(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Only these parameters require gradients, and have none afterwards that they had not before."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
