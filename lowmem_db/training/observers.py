"""What watches a run: the console, the metrics, samples and scores, and your own observers.

The trainer notifies all observers of each event, in order, and asks what they want. Add your own:
``lowmem_db.train(config, observers=[...])``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from PIL.Image import Image
from rich.progress import TaskID

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.console import progress, say, warn
from lowmem_db.errors import RunInterrupted, StorageError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.storage import asking
from lowmem_db.storage.run_copy import copy_run
from lowmem_db.storage.run_folder import RunFolder, append_row
from lowmem_db.training.metrics import MetricsWriter
from lowmem_db.training.rescue import write_row_or_save
from lowmem_db.training.scores import Scores

Metrics = Mapping[str, float]
Event = Literal["start", "step", "checkpoint", "samples", "score", "end"]
_LINES_WITHOUT_TERMINAL = 20


@runtime_checkable
class Training(Protocol):
    """What an observer may use of the :class:`lowmem_db.training.trainer.Trainer`.

    Attributes:
        config: The resolved configuration.
        run: The run folder.
        denoiser: The model.
        step: Optimizer steps done.
        num_samples: Samples of the last step that each process computed.
    """

    config: Config
    run: RunFolder
    denoiser: Denoiser
    step: int
    num_samples: tuple[int, ...]

    def weights(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights that samples use."""
        ...

    def save_checkpoint(self) -> None:
        """Save a checkpoint now."""
        ...

    def tell(self, event: Event, *details: Any) -> None:
        """Tell every observer what has happened."""
        ...


class Observer:
    """Base class: every method does nothing. An error raised by an observer ends the run."""

    def start(self, trainer: Training) -> None:
        """The run starts, or continues after ``trainer.step`` steps."""

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is done; ``row`` is its row of ``metrics.jsonl``."""

    def checkpoint(self, step: int) -> None:
        """A checkpoint of the last step was saved."""

    def samples(self, step: int, folder: Path) -> None:
        """Samples were drawn into a folder."""

    def score(self, step: int, metrics: Metrics) -> None:
        """The images of a step were scored."""

    def end(self) -> None:
        """The run ends, for whatever reason; no event follows."""

    def wants_checkpoint(self, step: int) -> bool:
        """Whether to save a checkpoint after a step."""
        return False

    def step_to_keep(self) -> int | None:
        """The step whose checkpoint must not be deleted, or None."""
        return None

    def reason_to_stop(self) -> str | None:
        """Why the run should stop before its last step, or None."""
        return None


class ConsoleBar(Observer):
    """A progress bar, and under it loss, pace and memory; without a terminal, a line from time to time."""

    def start(self, trainer: Training) -> None:
        """Show the bar."""
        self._total = trainer.config.training.max_train_steps
        self._bar = progress()
        self._bar.start()
        self._task: TaskID = self._bar.add_task("training", total=self._total, completed=trainer.step)
        self._pace = Pace()

    def step(self, row: Mapping[str, Any]) -> None:
        """Advance the bar."""
        step, every = row["step"], max(1, self._total // _LINES_WITHOUT_TERMINAL)
        seconds = self._pace.add(row["seconds"])
        self._bar.details = details_of(row, seconds)
        self._bar.update(self._task, advance=1)
        if self._bar.disable and (step == 1 or step % every == 0):
            left = timedelta(seconds=round((self._total - step) * seconds))
            say(f"step {step}/{self._total} ({100 * step // self._total} %), {left} left, {self._bar.details}")

    def end(self) -> None:
        """Remove the bar."""
        self._bar.stop()


class Pace:
    """The seconds of a step, as an average in which the last steps count most."""

    def __init__(self) -> None:
        self._seconds = self._weight = 0.0

    def add(self, seconds: float) -> float:
        """Add a step; return the average."""
        self._seconds = 0.9 * self._seconds + seconds
        self._weight = 0.9 * self._weight + 1
        return self._seconds / self._weight


def details_of(row: Mapping[str, Any], seconds: float) -> str:
    """Return loss, pace and memory of a step, in 80 columns."""
    prior = "" if row["loss_prior"] is None else f" (photos {row['loss_instance']:.3f}, class {row['loss_prior']:.3f})"
    memory = f", {row['peak_bytes'] / environment.GIB:.2f} GiB" if row["peak_bytes"] else ""
    return f"loss {row['loss']:.4f}{prior}, {seconds:.2f} s/step{memory}"


class MetricsFiles(Observer):
    """Writes ``metrics.jsonl``, and TensorBoard curves if asked for or installed."""

    def start(self, trainer: Training) -> None:
        """Open the files; rows of steps that will be repeated are gone already."""
        self._trainer = trainer
        self._writer = MetricsWriter(
            trainer.run, tensorboard=trainer.config.logging.tensorboard, start_step=trainer.step
        )

    def step(self, row: Mapping[str, Any]) -> None:
        """Append the row; if the disk refuses it, save the model in memory before the run ends."""
        trainer = self._trainer
        write_row_or_save(
            trainer.run,
            trainer.config,
            trainer.step,
            write=lambda: self._writer.write(dict(row)),
            save=trainer.save_checkpoint,
        )

    def score(self, step: int, metrics: Metrics) -> None:
        """Add the scores to the curves; :class:`ScoreKeeper` writes their file."""
        self._writer.write_curves({"step": step, **metrics})

    def end(self) -> None:
        """Close the files."""
        self._writer.close()


class RankRows(Observer):
    """Writes into ``ranks.jsonl`` how many samples each process computed, and checks that all computed as many."""

    def start(self, trainer: Training) -> None:
        """Keep the trainer."""
        self._trainer = trainer

    def step(self, row: Mapping[str, Any]) -> None:
        """Append a row; :class:`MetricsFiles` has just said if the disk is full.

        Raises:
            RuntimeError: A process left out samples, which must never happen.
        """
        counts = self._trainer.num_samples
        if len(set(counts)) > 1:
            raise RuntimeError(f"step {row['step']}: the processes computed {counts} samples")
        append_row(self._trainer.run.ranks_file, {"step": row["step"], "samples": list(counts)})


class RunCopy(Observer):
    """Keeps a copy of the run on another disk; one that cannot be written is reported, and the run goes on.

    Args:
        run: The run folder.
        copy: The folder of the copy.
    """

    def __init__(self, run: RunFolder, copy: RunFolder) -> None:
        self._run, self._copy = run, copy

    def checkpoint(self, step: int) -> None:
        """Copy the checkpoint, and what was drawn after it."""
        try:
            copy_run(self._run, self._copy, step)
        except StorageError as error:
            warn(f"checkpointing.copy_to: {error}; the run goes on without a new copy")


class Samples(Observer):
    """Draws ``sampling.prompts`` when they are due, always after a checkpoint of that step.

    Args:
        config: The configuration.
        run: The run folder.
        draw: Draws the samples of a step into its folder.
    """

    def __init__(self, config: Config, run: RunFolder, draw: Callable[[int], None]) -> None:
        self._config, self._run, self._draw = config, run, draw

    def start(self, trainer: Training) -> None:
        """Draw the samples that are missing if the run was killed after a checkpoint."""
        self._trainer = trainer
        if trainer.step == 0:
            self._draw_if_missing(0, self._config.sampling.at_start)
        else:
            self.checkpoint(trainer.step)

    def wants_checkpoint(self, step: int) -> bool:
        """Whether samples are due."""
        every = self._config.sampling.every or self._config.checkpointing.every
        return bool(self._config.sampling.prompts) and _is_due(step, every, self._config)

    def checkpoint(self, step: int) -> None:
        """Draw the samples, unless they exist."""
        self._draw_if_missing(step, self.wants_checkpoint(step))

    def draw_now(self) -> None:
        """Draw the samples of the last step, which has a checkpoint, unless they exist."""
        self._draw_if_missing(self._trainer.step, bool(self._config.sampling.prompts))

    def _draw_if_missing(self, step: int, is_due: bool) -> None:
        folder = self._run.samples_dir(step)
        if is_due and not folder.is_dir():
            with self._trainer.weights():
                self._draw(step)
            environment.reset_peak_bytes(self._trainer.denoiser.device)
            self._trainer.tell("samples", step, folder)


class Requests(Observer):
    """Does what the run is asked for in its folder (:mod:`lowmem_db.storage.asking`): save, draw samples, stop.

    Args:
        run: The run folder.
        draw: Draws samples of the last step.
    """

    def __init__(self, run: RunFolder, draw: Callable[[], None]) -> None:
        self._run, self._draw = run, draw

    def start(self, trainer: Training) -> None:
        """Stop at once if that was asked for while the run was prepared."""
        self._trainer = trainer
        if "stop" in asking.asked(self._run):
            self._stop()

    def wants_checkpoint(self, step: int) -> bool:
        """Whether anything is asked for; all of it begins with a checkpoint."""
        return bool(asking.asked(self._run))

    def checkpoint(self, step: int) -> None:
        """Do what is asked for, now that the checkpoint is saved.

        Raises:
            RunInterrupted: The run is asked to stop.
        """
        requests = asking.asked(self._run)
        if "sample" in requests:
            self._draw()
        if "stop" in requests and step < self._trainer.config.training.max_train_steps:
            self._stop()
        asking.take(self._run)

    def _stop(self) -> None:
        asking.take(self._run)
        raise RunInterrupted(f"asked to stop: stopped after step {self._trainer.step}; continue with --resume")


class ScoreKeeper(Observer):
    """Scores images when due, keeps the best checkpoint, and stops a run that no longer improves.

    Args:
        config: The configuration.
        run: The run folder.
        draw: Draws the images to score, by prompt.
        score: Returns the metrics for :meth:`Scores.add`.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        draw: Callable[[], Mapping[str, Sequence[Image]]],
        score: Callable[[Mapping[str, Sequence[Image]]], Metrics],
    ) -> None:
        self._config, self._draw, self._score = config, draw, score
        self._scores = Scores(run, config.evaluation.patience)

    def start(self, trainer: Training) -> None:
        """Score the step that is missing if the run was killed after a checkpoint."""
        self._trainer = trainer
        self.checkpoint(trainer.step)

    def wants_checkpoint(self, step: int) -> bool:
        """Whether a score is due."""
        every = self._config.evaluation.every
        return every is not None and _is_due(step, every, self._config)

    def checkpoint(self, step: int) -> None:
        """Score the step, unless it has a score."""
        if not self.wants_checkpoint(step) or self._scores.has(step):
            return
        with self._trainer.weights():
            found = self._score(self._draw())
        self._scores.add(step, found)
        environment.reset_peak_bytes(self._trainer.denoiser.device)
        self._trainer.tell("score", step, found)

    def step_to_keep(self) -> int | None:
        """The step with the best score, if ``evaluation.keep_best`` is set."""
        return self._scores.best_step() if self._config.evaluation.keep_best else None

    def reason_to_stop(self) -> str | None:
        """A reason if the last scores brought no new best."""
        if not self._scores.out_of_patience():
            return None
        return f"no better score since step {self._scores.best_step()}"


def _is_due(step: int, every: int, config: Config) -> bool:
    return step > 0 and (step % every == 0 or step == config.training.max_train_steps)
