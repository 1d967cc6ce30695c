"""The loop: when to step, to save, to sample and to stop."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from rich.progress import Progress, TaskID

from lowmem_db import environment, fingerprint
from lowmem_db.config.schema import Config
from lowmem_db.console import progress, say
from lowmem_db.data.batches import BatchSource
from lowmem_db.errors import NonFiniteError, StorageError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.lora import AdapterState, has_adapters
from lowmem_db.objective.objective import Objective
from lowmem_db.optimizers.ema import ExponentialMovingAverage
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.optimizers.schedules import learning_rate_factor
from lowmem_db.randomness import derive_seed
from lowmem_db.records import StepOutput
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.checkpoint import Stateful, restore_checkpoint, save_checkpoint
from lowmem_db.training.metrics import MetricsWriter
from lowmem_db.training.rescue import save_with_room, write_row_or_save
from lowmem_db.training.scores import Scores
from lowmem_db.training.signals import StopRequest, stop_on_signals
from lowmem_db.training.step import train_step

_LINES_WITHOUT_TERMINAL = 20


class Trainer:
    """Trains a denoiser from the step it stands at to ``training.max_train_steps``.

    Args:
        config: The configuration.
        run: The run folder.
        denoiser: What trains.
        objective: The loss.
        optimizer: Its groups are named after the components of the denoiser.
        batches: All batches of the run.
        ema: Moving average of the weights, or None.
        draw_samples: Called with the step when samples are due, always after a checkpoint of that step.
        score: Called when a score is due, always after a checkpoint; returns what :meth:`Scores.add` takes. None: no
            step is scored.

    Attributes:
        step: Optimizer steps done.
        peak_step_bytes: Most memory in use in a step so far, as :func:`environment.peak_bytes` counts it.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        denoiser: Denoiser,
        objective: Objective,
        optimizer: OptimizerHandle,
        batches: BatchSource,
        ema: ExponentialMovingAverage | None,
        draw_samples: Callable[[int], None],
        score: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.denoiser = denoiser
        self.objective = objective
        self.optimizer = optimizer
        self.batches = batches
        self.ema = ema
        self.draw_samples = draw_samples
        self.score = score
        self.scores = Scores(run, config.evaluation.patience)
        self.step = 0
        self.peak_step_bytes = 0

    def stateful_objects(self) -> dict[str, Stateful]:
        """Return the one list of what a checkpoint holds."""
        components = {
            name: AdapterState(name, module) if has_adapters(module) else module
            for name, module in self.denoiser.modules().items()
        }
        objects: dict[str, Stateful] = {**components, "optimizer": self.optimizer}
        return objects if self.ema is None else objects | {"ema": self.ema}

    def resume(self, step: int | None = None) -> None:
        """Continue from the checkpoint of a step, by default the newest complete one, or start where there is none.

        Raises:
            CheckpointError: The checkpoint is damaged, or belongs to other settings.
        """
        complete = self.run.complete_steps()
        if not complete:
            say(f"resume: {self.run.root} has no complete checkpoint, starting at step 1")
            return
        self.step = complete[-1] if step is None else step
        self._stop_text_encoder_where_due()
        data_key = restore_checkpoint(self.run, self.step, self.stateful_objects())
        if data_key != self._data_key():
            say(
                "resume: photos, class images or captions have changed since the checkpoint; going on with the new ones"
            )
        say(f"resume: going on after step {self.step}")

    def train(self) -> None:
        """Train to the last step, or until the scores are out of patience.

        Raises:
            RunInterrupted: The run was asked to stop; a checkpoint was saved.
            NonFiniteError: The loss or the gradient is not finite.
            StorageError: The disk is full.
        """
        self.run.truncate_rows(self.step)
        environment.reset_peak_bytes(self.denoiser.device)
        metrics = MetricsWriter(self.run, tensorboard=self.config.logging.tensorboard, start_step=self.step)
        try:
            with stop_on_signals(self.run, lambda: self.step) as stop, _progress() as bar:
                self._sample_and_score(stop, metrics)  # a run killed between checkpoint and samples still owes them
                task = bar.add_task(
                    "training", total=self.config.training.max_train_steps, completed=self.step, loss=""
                )
                while self.step < self.config.training.max_train_steps and not self.scores.out_of_patience():
                    row = self._step()
                    self._write_row(metrics, row)
                    self._show(bar, task, row)
                    self._after_step(stop, metrics)
            if self.step < self.config.training.max_train_steps:
                say(f"no better score since step {self.scores.best_step()}: stopped after step {self.step}")
        finally:
            metrics.close()

    def best_step(self) -> int | None:
        """Return the step whose checkpoint is kept for its score, or None where none is."""
        evaluation = self.config.evaluation
        return self.scores.best_step() if evaluation.every is not None and evaluation.keep_best else None

    def weights(self) -> AbstractContextManager[None]:
        """Return a context in which the denoiser has the weights that samples use."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def _step(self) -> dict[str, Any]:
        started = time.perf_counter()
        self._stop_text_encoder_where_due()
        rates = self._learning_rates()
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

    def _after_step(self, stop: StopRequest, metrics: MetricsWriter) -> None:
        done = self.step == self.config.training.max_train_steps
        is_due = self._is_due(self.config.checkpointing.every) or self._samples_are_due() or self._score_is_due()
        if is_due or done or stop:
            self._save_checkpoint()
            self._prune_checkpoints()
        if stop and not done:
            stop.stop()
        self._sample_and_score(stop, metrics)

    def _sample_and_score(self, stop: StopRequest, metrics: MetricsWriter) -> None:
        with stop.after_checkpoint("samples"):
            self._sample_where_due()
        with stop.after_checkpoint("scores"):
            self._score_where_due(metrics)

    def _write_row(self, metrics: MetricsWriter, row: dict[str, Any]) -> None:
        write_row_or_save(
            self.run, self.config, self.step, write=lambda: metrics.write(row), save=self._save_checkpoint
        )

    def _save_checkpoint(self) -> None:
        try:
            save_with_room(
                self.run,
                lambda: save_checkpoint(self.run, self.step, self.stateful_objects(), data_key=self._data_key()),
                keep=self.config.checkpointing.keep,
                also=self.best_step(),
            )
        except StorageError as error:
            raise StorageError(f"{error}, with --resume; {self._last_good_checkpoint()}") from error

    def _sample_where_due(self) -> None:
        if self._samples_are_due() and not self.run.samples_dir(self.step).is_dir():
            with self.weights():
                self.draw_samples(self.step)
            environment.reset_peak_bytes(self.denoiser.device)

    def _score_where_due(self, metrics: MetricsWriter) -> None:
        if self.score is None or not self._score_is_due() or self.scores.has(self.step):
            return
        with self.weights():
            found = self.score()
        self.scores.add(self.step, found)
        metrics.write_curves({"step": self.step, **found})
        self._prune_checkpoints()
        environment.reset_peak_bytes(self.denoiser.device)

    def _prune_checkpoints(self) -> None:
        self.run.prune_checkpoints(self.config.checkpointing.keep, also=self.best_step())

    def _score_is_due(self) -> bool:
        every = self.config.evaluation.every
        done = self.step == self.config.training.max_train_steps
        return every is not None and self.step > 0 and (self._is_due(every) or done)

    def _samples_are_due(self) -> bool:
        every = self.config.sampling.every or self.config.checkpointing.every
        done = self.step == self.config.training.max_train_steps
        return bool(self.config.sampling.prompts) and self.step > 0 and (self._is_due(every) or done)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0

    def _learning_rates(self) -> dict[str, float]:
        training = self.config.training
        factor = learning_rate_factor(
            training.lr_scheduler,
            self.step,
            max_train_steps=training.max_train_steps,
            lr_warmup_steps=training.lr_warmup_steps,
        )
        if training.scale_learning_rate:
            factor *= self.config.samples_per_step
        of_text_encoder = training.learning_rate_text_encoder or training.learning_rate
        return {
            "unet": training.learning_rate * factor,
            "text_encoder": of_text_encoder * factor,
            "text_encoder_2": (training.learning_rate_text_encoder_2 or of_text_encoder) * factor,
        }

    def _stop_text_encoder_where_due(self) -> None:
        stop = self.config.training.stop_text_encoder_training
        training = [name for name in self.optimizer.group_names() if name != "unet"]
        if stop is None or self.step < stop or not training:
            return
        for name in training:
            self.denoiser.modules()[name].requires_grad_(False)
            self.optimizer.remove_group(name)
        say(f"the text encoder stays as it is after step {stop}")

    def _row(self, output: StepOutput, rates: dict[str, float], seconds: float) -> dict[str, Any]:
        rates_of_text_encoders = {
            f"lr_{name}": rates[name] if name in self.optimizer.group_names() else None
            for name in ["text_encoder", *self.denoiser.modules()]
            if name != "unet"
        }
        values = asdict(output)
        peak_bytes = environment.peak_bytes(self.denoiser.device)
        self.peak_step_bytes = max(self.peak_step_bytes, peak_bytes)
        return {
            "step": self.step,
            "loss": values["loss"],
            "loss_instance": values["loss_instance"],
            "loss_prior": values["loss_prior"],
            "lr": rates["unet"],
            **rates_of_text_encoders,
            "grad_norm": values["grad_norm"],
            "seconds": round(seconds, 4),
            "peak_bytes": peak_bytes,
        }

    def _data_key(self) -> str:
        images = [*self.batches.instance_images, *self.batches.class_images]
        return fingerprint.of_values([[image.record.content_key, image.record.prompt] for image in images])

    def _last_good_checkpoint(self) -> str:
        complete = self.run.complete_steps()
        if not complete:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.run.checkpoint_dir(complete[-1])}"

    def _show(self, bar: Progress, task: TaskID, row: dict[str, Any]) -> None:
        prior = "" if row["loss_prior"] is None else f" prior {row['loss_prior']:.4f}"
        text = f"loss {row['loss']:.4f} instance {row['loss_instance']:.4f}{prior} {row['seconds']:.2f} s/step"
        bar.update(task, advance=1, loss=text)
        total = self.config.training.max_train_steps
        if bar.disable and (self.step == 1 or self.step % max(1, total // _LINES_WITHOUT_TERMINAL) == 0):
            say(f"step {self.step}/{total} {text}")


def _progress() -> Progress:
    return progress("{task.fields[loss]}")
