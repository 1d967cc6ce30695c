"""The loop: when to step, save and stop. Observers do everything else."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lowmem_db import environment, fingerprint
from lowmem_db.adaptation.base import Adaptation, Stateful
from lowmem_db.adaptation.layers import that_train
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.data.batches import BatchSource
from lowmem_db.engine.step import train_step
from lowmem_db.errors import NonFiniteError, StorageError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.objective.objective import Objective
from lowmem_db.optimizers.ema import ExponentialMovingAverage
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.optimizers.schedules import learning_rates
from lowmem_db.randomness import derive_seed
from lowmem_db.records import StepOutput
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.checkpoint import restore_checkpoint, save_checkpoint
from lowmem_db.training.observers import Event, Observer
from lowmem_db.training.rescue import save_with_room
from lowmem_db.training.signals import StopRequest, stop_on_signals


class Trainer:
    """Trains a denoiser from its current step to ``training.max_train_steps``.

    Args:
        config: The resolved configuration.
        run: The run folder.
        denoiser: The model, with the adaptation attached.
        adaptation: What trains: all weights, or adapters.
        objective: The loss.
        optimizer: The optimizer; its groups are named after the components of the denoiser.
        batches: All batches of the run.
        ema: Moving average of the weights, or None.
        observers: Notified of each event, in this order.

    Attributes:
        step: Optimizer steps done.
        peak_step_bytes: Peak memory of a step so far, as counted by :func:`environment.peak_bytes`.
        trained_modules: Components that train, or trained until they were stopped.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        denoiser: Denoiser,
        adaptation: Adaptation,
        objective: Objective,
        optimizer: OptimizerHandle,
        batches: BatchSource,
        ema: ExponentialMovingAverage | None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.config = config
        self.run = run
        self.denoiser = denoiser
        self.adaptation = adaptation
        self.objective = objective
        self.optimizer = optimizer
        self.batches = batches
        self.ema = ema
        self.observers = observers
        self.trained_modules: dict[str, nn.Module] = that_train(denoiser.modules())
        self.step = 0
        self.peak_step_bytes = 0

    def stateful_objects(self) -> dict[str, Stateful]:
        """Return the objects that a checkpoint holds, by name."""
        objects: dict[str, Stateful] = {
            name: self.adaptation.state(name, module) for name, module in self.trained_modules.items()
        }
        objects["optimizer"] = self.optimizer
        return objects if self.ema is None else objects | {"ema": self.ema}

    def resume(self, step: int | None = None) -> None:
        """Continue from the checkpoint of a step (default: the newest complete one), or start if there is none.

        Raises:
            CheckpointError: The checkpoint is damaged, or was written with different settings.
        """
        complete = self.run.complete_steps()
        if not complete:
            say(f"resume: {self.run.root} has no complete checkpoint; starting at step 1")
            return
        self.step = complete[-1] if step is None else step
        self._stop_text_encoders_where_due()
        data_key = restore_checkpoint(self.run, self.step, self.stateful_objects())
        if data_key != self._data_key():
            say("resume: photos, class images or captions have changed since the checkpoint; the new ones are used")
        say(f"resume: continuing after step {self.step}")

    def train(self) -> None:
        """Train to the last step, or until an observer has a reason to stop.

        Raises:
            RunInterrupted: The run was asked to stop; a checkpoint was saved.
            NonFiniteError: The loss or the gradient is not finite.
            StorageError: The disk is full.
        """
        self.run.truncate_rows(self.step)
        environment.reset_peak_bytes(self.denoiser.device)
        with stop_on_signals(self.run, lambda: self.step) as stop, self._observed(stop):
            reason = self._reason_to_stop()
            while not self.is_done and reason is None:
                self.tell("step", self._step())
                self._after_step(stop)
                reason = self._reason_to_stop()
        if not self.is_done:
            say(f"{reason}: stopped after step {self.step}")

    @property
    def is_done(self) -> bool:
        """Whether the last step is done."""
        return self.step == self.config.training.max_train_steps

    def tell(self, event: Event, *details: Any) -> None:
        """Notify every observer of an event."""
        for observer in self.observers:
            getattr(observer, event)(*details)

    def step_to_keep(self) -> int | None:
        """Return the step whose checkpoint an observer wants to keep, or None."""
        return next((step for observer in self.observers if (step := observer.step_to_keep()) is not None), None)

    def weights(self) -> AbstractContextManager[None]:
        """Return a context in which the denoiser has the weights that samples use."""
        return nullcontext() if self.ema is None else self.ema.applied()

    @contextmanager
    def _observed(self, stop: StopRequest) -> Iterator[None]:
        """Start the observers; afterwards end those that were started, in reverse order."""
        started: list[Observer] = []
        try:
            with stop.after_checkpoint("samples and scores") if self.step else nullcontext():
                for observer in self.observers:
                    started.append(observer)
                    observer.start(self)
            yield
        finally:
            for observer in reversed(started):
                observer.end()

    def _step(self) -> dict[str, Any]:
        started = time.perf_counter()
        self._stop_text_encoders_where_due()
        rates = learning_rates(self.config, self.denoiser.modules(), self.step)
        self.optimizer.set_learning_rates(rates)
        torch.manual_seed(derive_seed(self.config.seed, "dropout", self.step))
        try:
            output = train_step(
                self.denoiser, self.objective, self.optimizer, self.batches.batches_at(self.step), self.step
            )
        except NonFiniteError as error:
            raise NonFiniteError(
                f"step {self.step + 1}: {error}; {self._last_good_checkpoint()}, lower training.learning_rate and "
                "continue with --resume"
            ) from error
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        return self._row(output, rates, time.perf_counter() - started)

    def _after_step(self, stop: StopRequest) -> None:
        wanted = [observer.wants_checkpoint(self.step) for observer in self.observers]
        is_saved = any(wanted) or self.step % self.config.checkpointing.every == 0 or self.is_done or bool(stop)
        if is_saved:
            self.save_checkpoint()
        if stop and not self.is_done:
            stop.stop()
        if is_saved:
            with stop.after_checkpoint("samples and scores"):
                self.tell("checkpoint", self.step)
                self._prune_checkpoints()  # again: a score may have changed which one is best

    def save_checkpoint(self) -> None:
        """Save a checkpoint now.

        Raises:
            StorageError: The disk is full; the newest checkpoint is untouched.
        """
        try:
            save_with_room(
                self.run,
                lambda: save_checkpoint(self.run, self.step, self.stateful_objects(), data_key=self._data_key()),
                keep=self.config.checkpointing.keep,
                also=self.step_to_keep(),
            )
        except StorageError as error:
            raise StorageError(f"{error}, with --resume; {self._last_good_checkpoint()}") from error
        self._prune_checkpoints()

    def _prune_checkpoints(self) -> None:
        keep = self.config.checkpointing.keep
        is_passing = self._is_only_for_samples if keep is None else lambda step: False
        self.run.prune_checkpoints(keep, also=self.step_to_keep(), is_passing=is_passing)

    def _is_only_for_samples(self, step: int) -> bool:
        config = self.config
        due = [config.checkpointing.every, config.evaluation.every, config.training.max_train_steps]
        of_samples = config.sampling.every
        return of_samples is not None and step % of_samples == 0 and all(every is None or step % every for every in due)

    def _reason_to_stop(self) -> str | None:
        return next((reason for observer in self.observers if (reason := observer.reason_to_stop())), None)

    def _stop_text_encoders_where_due(self) -> None:
        stop = self.config.training.stop_text_encoder_training
        _, *text_encoders = self.denoiser.modules()
        training = [name for name in text_encoders if name in self.optimizer.group_names()]
        if stop is None or self.step < stop or not training:
            return
        for name in training:
            self.denoiser.modules()[name].requires_grad_(False)
            self.optimizer.remove_group(name)
        say(f"the text encoder stops training after step {stop}")

    def _row(self, output: StepOutput, rates: dict[str, float], seconds: float) -> dict[str, Any]:
        peak_bytes = environment.peak_bytes(self.denoiser.device)
        self.peak_step_bytes = max(self.peak_step_bytes, peak_bytes)
        values = asdict(output)
        gradient_norm = values.pop("grad_norm")
        return {
            "step": self.step,
            **values,
            **self._rates_of_row(rates),
            "grad_norm": gradient_norm,
            "seconds": round(seconds, 4),
            "peak_bytes": peak_bytes,
        }

    def _rates_of_row(self, rates: dict[str, float]) -> dict[str, float | None]:
        """Return the rates under their names in ``metrics.jsonl``; None for a component that does not train."""
        stepped = {name: rates[name] if name in self.optimizer.group_names() else None for name in rates}
        denoiser, *others = rates
        return {"lr": stepped[denoiser], "lr_text_encoder": None} | {f"lr_{name}": stepped[name] for name in others}

    def _data_key(self) -> str:
        images = [*self.batches.instance_images, *self.batches.class_images]
        return fingerprint.of_values([[image.record.content_key, image.record.prompt] for image in images])

    def _last_good_checkpoint(self) -> str:
        complete = self.run.complete_steps()
        if not complete:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.run.checkpoint_dir(complete[-1])}"
