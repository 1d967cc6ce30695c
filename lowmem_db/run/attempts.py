"""Training a run; each time memory runs out, once more with a strategy that needs less and trains the same.

The model is built anew and continues from the newest checkpoint, which the trainer has just saved if the weights in
memory were whole. As a resumed run ends with the same bits, so does this one.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lowmem_db import environment, out_of_memory
from lowmem_db.adaptation.finding import find_adaptation
from lowmem_db.adaptation.layers import count_trained
from lowmem_db.config.loading import to_yaml
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import changed, describe
from lowmem_db.console import quoted, say
from lowmem_db.data.batches import BatchSource
from lowmem_db.distributed.watch import RankError
from lowmem_db.distributed.world import ALONE, World
from lowmem_db.engine.build import build_ema, build_step
from lowmem_db.engine.draw import Thrift
from lowmem_db.engine.samples import draw_images, draw_samples
from lowmem_db.errors import BudgetError
from lowmem_db.evaluation.during_training import Scorer
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU
from lowmem_db.out_of_memory import Place
from lowmem_db.planning.allowance import held_by_others
from lowmem_db.planning.ladder import Ladder, Phase
from lowmem_db.planning.measured import write_measured, write_stepped_down, write_trained
from lowmem_db.planning.phases import TracedRun
from lowmem_db.planning.plan import gib
from lowmem_db.planning.target import Target
from lowmem_db.run.checks import uses_wandb
from lowmem_db.run.final import write_final
from lowmem_db.run.page import ReportPage, write_page
from lowmem_db.storage.atomic import write_text
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.observers import (
    ConsoleBar,
    MetricsFiles,
    Observer,
    RankRows,
    Requests,
    RunCopy,
    Samples,
    ScoreKeeper,
)
from lowmem_db.training.rescue import write_memory_summary
from lowmem_db.training.spill import SpillWatch
from lowmem_db.training.trainer import Trainer
from lowmem_db.training.weights_and_biases import WeightsAndBiases


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is ready to train.

    Attributes:
        run: The run folder.
        config: The resolved configuration.
        chosen: Paths of the fields in it that the planner has chosen.
        model: The model.
        device: The device to train on.
        target: What the run was planned for.
        batches: All batches of the run.
        scorer: Scores images while the run trains, or None.
        observers: Notified after the run's own observers.
        world: The processes that share each step.
    """

    run: RunFolder
    config: Config
    chosen: Collection[str]
    model: ModelFolder
    device: torch.device
    target: Target
    batches: BatchSource
    scorer: Scorer | None
    observers: Sequence[Observer]
    world: World = ALONE


@dataclass(frozen=True)
class _Failure:
    """Where memory ran out.

    Attributes:
        step: Optimizer steps done.
        phase: What ran out of memory.
        place: Whose memory was too small.
        reason: What the allocator said.
        held_by_others: Bytes of the device that other programs hold.
        details: Where more is to be found, to be put behind a message.
    """

    step: int
    phase: Phase
    place: Place
    reason: str
    held_by_others: int = 0
    details: str = ""

    def describe(self) -> str:
        when = {"train": f"step {self.step + 1}", "sample": f"samples of step {self.step}"}[self.phase]
        others = f"; other programs hold {gib(self.held_by_others)} of it" if self.held_by_others else ""
        return f"{when}: out of memory on the {self.place} ({self.reason}{others})"


class Attempts:
    """Attempts at training a run, the first with the planned strategy.

    Args:
        prepared: The run.
    """

    def __init__(self, prepared: PreparedRun) -> None:
        self._prepared = prepared
        self._config = prepared.config
        self._trainer: Trainer | None = None
        self._thrift = Thrift(is_shared=prepared.config.distributed.sharding == "full")
        traced = TracedRun(config=prepared.config, model=prepared.model, card=prepared.target.card)
        self._ladder = Ladder(traced, prepared.chosen, prepared.target.budget_bytes)

    def train(self, *, resume: bool) -> None:
        """Train, and write the final model.

        Args:
            resume: Continue from the newest complete checkpoint.

        Raises:
            BudgetError: Memory ran out, and no strategy needs less.
        """
        while (failure := self._attempt(resume=resume)) is not None:
            self._step_down(failure)
            resume = True

    def _attempt(self, *, resume: bool) -> _Failure | None:
        """Train to the end; return where memory ran out, with nothing of the attempt left in memory."""
        try:
            self._train(resume=resume)
        except Exception as error:
            place = out_of_memory.place_of(error)
            if place is None or isinstance(error, RankError):
                raise
            trainer, self._trainer = self._trainer, None
            step, phase = (0, "train") if trainer is None else (trainer.step, trainer.phase)
            failure = _Failure(step, phase, place, out_of_memory.reason_of(error), **self._seen_on_card(place, trainer))
            if trainer is not None:
                vars(trainer).clear()  # observers still refer to it, and it to the model
            del trainer
            out_of_memory.forget(error)
            return failure
        return None

    def _seen_on_card(self, place: Place, trainer: Trainer | None) -> dict[str, Any]:
        """Return what a full card shows; the table of its allocator is written unless the trainer has done so."""
        run, device = self._prepared.run, self._prepared.device
        has_summary = trainer is not None and trainer.has_memory_summary
        if not self._prepared.world.is_first or not (has_summary or write_memory_summary(run, device, place)):
            return {}
        return {"held_by_others": held_by_others(device), "details": f"; {run.memory_summary_file} shows what held it"}

    def _step_down(self, failure: _Failure) -> None:
        """Choose a strategy that needs less, and write it into the run folder.

        Raises:
            BudgetError: Nothing needs less.
        """
        run = self._prepared.run
        if self._prepared.world.size > 1:
            raise BudgetError(
                f"{failure.describe()}; {_newest_checkpoint(run)}. Several processes do not change their strategy "
                "while they train: free memory, or set memory.budget lower, and continue with --resume"
            )
        smaller = self._ladder.below(self._config, failure.phase, failure.place)
        if smaller is None:
            raise BudgetError(
                f"{failure.describe()}, and no strategy that the configuration leaves open needs less; "
                f"{_newest_checkpoint(run)}. The smallest budget that is predicted to be enough is "
                f"{self._ladder.smallest()}. Free memory or leave memory fields out, and continue with "
                f"--resume{failure.details}"
            )
        say(f"{failure.describe()}; continuing {_from_where(run)} with: {describe(smaller)}{failure.details}")
        write_stepped_down(run, step=failure.step, reason=failure.describe(), strategy=smaller)
        self._use(smaller)

    def _use(self, config: Config) -> None:
        self._config = config
        write_text(self._prepared.run.config_file, to_yaml(config))

    def _train(self, *, resume: bool) -> None:
        run, model, device = self._prepared.run, self._prepared.model, self._prepared.device
        world = self._prepared.world
        trainer = self._trainer = build_trainer(self._config, model, device, self._prepared.batches, run, world)
        if not world.is_first:
            self._follow(trainer, resume=resume)
            return
        trainer.observers = [*self._own_observers(trainer), *self._prepared.observers]
        write_trained(run, count_trained(trainer.denoiser.modules()))
        _say_what_is_slow(self._config, device)
        _say_what_trains(model, trainer, device)
        if resume:
            trainer.resume()
        trainer.train()
        if device.type == "cuda":
            write_measured(run, trainer.peak_step_bytes)
        best = trainer.step_to_keep()
        step = trainer.step if best is None else best
        if step != trainer.step:
            say(f"the final model is taken from step {step}, which scored best")
        if step != trainer.step or trainer.is_shared_out:
            config, device = (_on_host(self._config), CPU) if trainer.is_shared_out else (self._config, device)
            trainer.observers = ()  # which refer to it, so that the model would stay in memory
            self._trainer = None
            del trainer
            environment.release_memory(self._prepared.device)
            trainer = self._trainer = build_trainer(config, model, device, self._prepared.batches, run)
            trainer.resume(step)
        write_final(trainer, model)
        write_page(run)
        say(f"done: {run.final_dir} holds the {trainer.adaptation.noun}; draw with it:")
        own = quoted(run.root)
        say(f"lowmem-db generate {f'FIRST_STAGE --upscale {own}' if model.family.enlarges else own}")

    def _follow(self, trainer: Trainer, *, resume: bool) -> None:
        """Share the steps and the drawing of the first process, which does everything else."""
        config, model, denoiser = trainer.config, self._prepared.model, trainer.denoiser
        table, world = trainer.batches.prompts, trainer.world
        trainer.draw = partial(draw_images, config, model, denoiser, table, thrift=self._thrift, world=world)
        if resume:
            trainer.resume()
        trainer.train()

    def _own_observers(self, trainer: Trainer) -> Iterator[Observer]:
        config, run, prompts, model = trainer.config, trainer.run, trainer.batches.prompts, self._prepared.model
        thrift, scorer = self._thrift, self._prepared.scorer

        def draw(step: int) -> None:
            draw_samples(config, model, trainer.denoiser, prompts, run, thrift, step, trainer.world)
            self._note_thrift()

        yield ConsoleBar()
        yield MetricsFiles()
        if trainer.world.size > 1:
            yield RankRows()
        yield SpillWatch(trainer.denoiser.device)
        if uses_wandb(config):
            yield WeightsAndBiases()
        samples = Samples(config, run, draw)
        yield samples
        if config.checkpointing.copy_to is not None:
            yield RunCopy(run, RunFolder(config.checkpointing.copy_to))
        yield ReportPage(run)
        if scorer is not None:
            scored = sorted(config.prompts_scored)
            drawn = partial(draw_images, config, model, trainer.denoiser, prompts, scored, thrift, trainer.world)
            yield ScoreKeeper(config, run, lambda: dict(drawn()), scorer)
        yield Requests(run, samples.draw_now)

    def _note_thrift(self) -> None:
        """Let a resumed run draw samples with little memory from the start if memory ran out here."""
        if self._thrift.is_reduced and not self._config.memory.tiled_samples:
            self._use(changed(self._config, {"memory.tiled_samples": True}))


def build_trainer(
    config: Config,
    model: ModelFolder,
    device: torch.device,
    batches: BatchSource,
    run: RunFolder,
    world: World = ALONE,
) -> Trainer:
    """Load the model onto the device and build the trainer, without observers.

    Args:
        config: The resolved configuration.
        model: The model.
        device: The device to train on.
        batches: All batches of the run, each as a whole.
        run: The run folder.
        world: The processes that share each step.
    """
    denoiser, objective, optimizer = build_step(config, model, device, world=world)
    batches = batches.in_parts(max(1, config.memory.micro_batches or 0)).of_rank(world.rank, world.size)
    ema = build_ema(config, denoiser, optimizer)
    return Trainer(config, run, denoiser, find_adaptation(config), objective, optimizer, batches, ema, world=world)


def _on_host(config: Config) -> Config:
    """Return a configuration that builds the same weights on the host, which has no kernels of a card."""
    return changed(config, {"memory.fused_layers": False, "memory.attention": "sdpa"})


def _newest_checkpoint(run: RunFolder) -> str:
    complete = run.complete_steps()
    return f"the newest checkpoint is {run.checkpoint_dir(complete[-1])}" if complete else "there is no checkpoint yet"


def _from_where(run: RunFolder) -> str:
    complete = run.complete_steps()
    return f"after step {complete[-1]}" if complete else "from the start"


def _say_what_is_slow(config: Config, device: torch.device) -> None:
    """Say which operators have no compiled kernel, also on the host where the optimizer steps there."""
    for computing in [device, CPU] if config.memory.optimizer_step == "host" and device != CPU else [device]:
        if (note := environment.slow_kernels(computing)) is not None:
            say(note)


def _say_what_trains(model: ModelFolder, trainer: Trainer, device: torch.device) -> None:
    trained = ", ".join(f"{name} {count:,}" for name, count in count_trained(trainer.denoiser.modules()).items())
    say(f"training {model.name} ({model.family.name}) on {device}: {trained} parameters train")
