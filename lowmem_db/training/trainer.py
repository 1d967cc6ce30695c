"""The loop: when to step, save and stop. Observers do everything else."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import nn

from lowmem_db import environment, fingerprint, out_of_memory
from lowmem_db.adaptation.base import Adaptation, Stateful
from lowmem_db.adaptation.layers import that_train
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.data.batches import BatchSource
from lowmem_db.distributed.reduction import bits_of
from lowmem_db.distributed.watch import RankError
from lowmem_db.distributed.world import ALONE, World, share_state
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
from lowmem_db.training.rescue import save_with_room, write_memory_summary
from lowmem_db.training.shared_state import SharedState, parameters_shared_out
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
        world: The processes that share each step. The first one has the observers and writes the run folder.

    Attributes:
        step: Optimizer steps done.
        phase: What it does now, as the planner calls it; scores count as samples.
        peak_step_bytes: Peak memory of a step so far, as counted by :func:`environment.peak_bytes`.
        has_memory_summary: Whether what held a full card was written into the run folder.
        trained_modules: Components that train, or trained until they were stopped.
        num_samples: Samples of the last step that each process computed.
        draw: Draws prompts together with the first process, in the others.
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
        world: World = ALONE,
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
        self.world = world
        self.num_samples: tuple[int, ...] = ()
        self.draw: Callable[[Sequence[str]], object] | None = None
        self._saved = time.monotonic()
        self._shared_parameters = parameters_shared_out(denoiser.modules())
        self.trained_modules: dict[str, nn.Module] = that_train(denoiser.modules())
        self.step = 0
        self.peak_step_bytes = 0
        self.phase: Literal["train", "sample"] = "train"
        self.has_memory_summary = False
        self._whole_at: tuple[int, int] | None = None

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
        complete = self.world.from_first(self.run.complete_steps)
        if not complete:
            say(f"resume: {self.run.root} has no complete checkpoint; starting at step 1")
            return
        self.step = complete[-1] if step is None else step
        self._stop_text_encoders_where_due()
        data_key = self._restore()
        if data_key != self._data_key():
            say("resume: photos, class images or captions have changed since the checkpoint; the new ones are used")
        say(f"resume: continuing after step {self.step}")

    def _restore(self) -> str:
        """Restore the checkpoint of a step in all processes; return the key of its data."""
        if (shared := self._shared_state()) is not None:
            return self._restore_parts(shared)
        data_key = self.world.from_first(lambda: restore_checkpoint(self.run, self.step, self.stateful_objects()))
        for stateful in self.stateful_objects().values() if self.world.size > 1 else ():
            received = share_state(self.world, stateful.state_dict())
            if not self.world.is_first:
                stateful.load_state_dict(received)
        return data_key

    def _restore_parts(self, shared: SharedState) -> str:
        if not self.world.is_first:
            shared.answer()
            return self.world.from_first(str)
        with shared.asking() as objects:
            data_key = restore_checkpoint(self.run, self.step, objects)
        return self.world.from_first(lambda: data_key)

    def _shared_state(self) -> SharedState | None:
        """Return what makes whole objects of the parts of all processes; None if each has the whole model."""
        if not self.is_shared_out:
            return None
        return SharedState(self.world, self.stateful_objects(), self._shared_parameters)

    def train(self) -> None:
        """Train to the last step, or until an observer has a reason to stop.

        Raises:
            RunInterrupted: The run was asked to stop; a checkpoint was saved.
            NonFiniteError: The loss or the gradient is not finite.
            StorageError: The disk is full.
            RankError: Another process has ended; a checkpoint was saved if the weights are whole.
            Exception: Memory ran out (:func:`out_of_memory.place_of`); a checkpoint was saved if the weights are whole.
        """
        if self.world.is_first:
            self.run.truncate_rows(self.step)
        self.world.check_same("photos, class images and captions", self._data_key())
        self._check_same_weights()
        self._saved = time.monotonic()
        environment.reset_peak_bytes(self.denoiser.device)
        with stop_on_signals(self.run, lambda: self.step, is_passed_on=self.world.size > 1) as stop:
            try:
                with self._observed(stop):
                    reason = self._steps(stop)
                self.phase = "train"
            except RankError as error:
                self._save_if_whole(error)
                if not self.world.is_first:
                    raise
                way_out = f"{self._last_good_checkpoint()}, continue with --resume"
                raise RankError(f"{error}; {way_out}", error.exit_code) from error
            except Exception as error:
                if (place := out_of_memory.place_of(error)) is not None:
                    if self.world.is_first:
                        self.has_memory_summary = write_memory_summary(self.run, self.denoiser.device, place)
                    self._save_if_whole(error)
                    if stop:
                        stop.stop()
                raise
        if not self.is_done:
            say(f"{reason}: stopped after step {self.step}")

    def _steps(self, stop: StopRequest) -> str | None:
        """Step until the run is done or there is a reason to stop; return the reason."""
        self._whole_at = self._counts()
        reason = self._reason_to_stop()
        while not self.is_done and reason is None:
            self.phase = "train"
            self.tell("step", self._step())
            self._whole_at = self._counts()
            self._after_step(stop)
            reason = self._reason_to_stop()
        return reason

    def _save_if_whole(self, error: Exception) -> None:
        """Free what the failed step holds, and save a checkpoint unless memory ran out while weights changed."""
        out_of_memory.forget(error)
        self.optimizer.zero_grad()
        out_of_memory.release()
        if self._counts() != self._whole_at or self.step in {0, *self.run.complete_steps()}:
            return
        if self.is_shared_out:
            return  # a process that has ended takes its part of the model with it
        try:
            self.save_checkpoint()
        except Exception as second:
            if out_of_memory.place_of(second) is None:
                raise
            out_of_memory.forget(second)

    def _counts(self) -> tuple[int, int]:
        """Return the steps done and those the optimizer has begun; in between, weights are neither old nor new."""
        return self.step, self.optimizer.num_steps

    @property
    def is_shared_out(self) -> bool:
        """Whether this process holds only a part of the model."""
        return self.config.distributed.sharding == "full" and self.world.size > 1

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
            self.phase = "sample"
            with stop.after_checkpoint("samples and scores") if self.step else nullcontext():
                for observer in self.observers:
                    started.append(observer)
                    observer.start(self)
                self._draw_with_the_first()
            yield
        finally:
            for observer in reversed(started):
                observer.end()

    def _step(self) -> dict[str, Any]:
        started = time.perf_counter()
        self._stop_text_encoders_where_due()
        rates = learning_rates(self.config, self.denoiser.modules(), self.step)
        self.optimizer.set_learning_rates(rates)
        torch.manual_seed(derive_seed(self.config.seed, "dropout", self.step, *self._own_dropout()))
        try:
            output = train_step(
                self.denoiser, self.objective, self.optimizer, self.batches.batches_at(self.step), self.step
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.step + 1}: {error}; {self._way_out()}") from error
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        return self._row(output, rates, time.perf_counter() - started)

    def _after_step(self, stop: StopRequest) -> None:
        wanted = [observer.wants_checkpoint(self.step) for observer in self.observers]
        is_due = self.step % self.config.checkpointing.every == 0 or self._is_old()
        is_due = self._agree(any(wanted) or is_due, stop)
        is_saved = is_due or self.is_done or bool(stop)
        if is_saved:
            self._check_same_weights()
            self._save_together()
            self.world.wait_for_all()
        if stop and not self.is_done:
            stop.stop()
        if is_saved:
            self.phase = "sample"
            with stop.after_checkpoint("samples and scores"):
                self.tell("checkpoint", self.step)
                self._draw_with_the_first()
                self._prune_checkpoints()  # again: a score may have changed which one is best

    def _agree(self, is_due: bool, stop: StopRequest) -> bool:
        """Return whether the first process wants a checkpoint; a process that was asked to stop stops all.

        Raises:
            RuntimeError: The processes reduced the gradients of different parameters, which must never happen.
        """
        said = self.world.gathered((is_due, stop.signal_name, self.optimizer.reduction.order))
        if len({order for _, _, order in said}) > 1:
            raise RuntimeError(f"step {self.step}: the processes stepped their parameters in different orders")
        asked = [(rank, name) for rank, (_, name, _) in enumerate(said) if name is not None]
        if asked and stop.signal_name is None:
            rank, name = asked[0]
            stop.signal_name = f"{name} of rank {rank}"
        return said[0][0]

    def _draw_with_the_first(self) -> None:
        """Draw what the first process asks the others for, until it has all samples and scores of a step."""
        while self.world.size > 1 and (prompts := self.world.from_first(lambda: None)) is not None:
            assert self.draw is not None, "nobody can draw here"
            with self.weights():
                self.draw(prompts)

    def _check_same_weights(self) -> None:
        if self.world.size > 1:
            self.world.check_same("weights", bits_of(self.optimizer.parameters()))

    def _own_dropout(self) -> list[int]:
        """Return what makes the dropout of LoRAs differ between processes: it is drawn batch after batch."""
        return [self.world.rank] if self.world.rank else []

    def _is_old(self) -> bool:
        """Return whether the last checkpoint is older than ``checkpointing.every_minutes``."""
        minutes = self.config.checkpointing.every_minutes
        return minutes is not None and time.monotonic() - self._saved > 60 * minutes

    def save_checkpoint(self) -> None:
        """Save a checkpoint now.

        Raises:
            NonFiniteError: A weight is infinite or NaN; the newest checkpoint is untouched.
            StorageError: The disk is full, or other processes hold parts of the model; the newest checkpoint is
                untouched.
        """
        if self.is_shared_out:
            raise StorageError(f"{self.run.root}: the first of several processes cannot save what the others hold")
        if self.world.is_first:
            with self.world.undisturbed():
                self._save(self.stateful_objects())

    def _save_together(self) -> None:
        """Save a checkpoint; all processes call this at the same time, because each may hold a part of it."""
        if (shared := self._shared_state()) is None:
            self.save_checkpoint()
        elif self.world.is_first:
            with shared.asking() as objects:
                self._save(objects)
        else:
            shared.answer()

    def _save(self, objects: Mapping[str, Stateful]) -> None:
        try:
            save_with_room(
                self.run,
                lambda: save_checkpoint(self.run, self.step, objects, data_key=self._data_key()),
                keep=self.config.checkpointing.keep,
                also=self.step_to_keep(),
            )
        except StorageError as error:
            raise StorageError(f"{error}, with --resume; {self._last_good_checkpoint()}") from error
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.step}: {error}; {self._way_out()}") from error
        self._saved = time.monotonic()
        self._prune_checkpoints()

    def _prune_checkpoints(self) -> None:
        if not self.world.is_first:
            return
        keep = self.config.checkpointing.keep
        is_passing = self._is_only_for_samples if keep is None else lambda step: False
        self.run.prune_checkpoints(keep, also=self.step_to_keep(), is_passing=is_passing)

    def _is_only_for_samples(self, step: int) -> bool:
        config = self.config
        due = [config.checkpointing.every, config.evaluation.every, config.training.max_train_steps]
        of_samples = config.sampling.every
        return of_samples is not None and step % of_samples == 0 and all(every is None or step % every for every in due)

    def _reason_to_stop(self) -> str | None:
        reasons = (reason for observer in self.observers if (reason := observer.reason_to_stop()))
        return self.world.from_first(lambda: next(reasons, None))

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
        gradient_norm, self.num_samples = values.pop("grad_norm"), values.pop("num_samples")
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

    def _way_out(self) -> str:
        return f"{self._last_good_checkpoint()}, lower training.learning_rate and continue with --resume"

    def _last_good_checkpoint(self) -> str:
        complete = self.run.complete_steps()
        if not complete:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.run.checkpoint_dir(complete[-1])}"
