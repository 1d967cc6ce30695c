"""Compiled blocks under checkpoints and hooks: the same steps, and the same bits when they are done again."""

import pytest
import torch
from torch import nn

from lowmem_db.bench.steps import Steps, first_difference
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import changed, resolve
from lowmem_db.errors import ConfigError, DependencyError
from lowmem_db.memory import compiling
from lowmem_db.models.finding import model_of
from lowmem_db.planning.cards import CPU as CPU_CARD
from lowmem_db.planning.phases import TracedRun, trace_train
from tests.config.test_rules import NEEDED
from tests.memory.test_channels_last import IN_BACKWARD, steps, weights

ON = {"training.compile": True}


@pytest.fixture
def plain(tiny_config: Config) -> Config:
    return resolve(changed(tiny_config, IN_BACKWARD))


@pytest.fixture
def _traced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as in a run, without the minutes that a C++ compiler takes for all blocks."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiling, "REPEATED", ("BasicTransformerBlock",))


def check_steps(plain: Config, *, compiled_anew: bool) -> None:
    """Compare compiled steps with others, and a step with itself done again from what was saved."""
    there, here = steps(plain, 2), steps(changed(plain, ON), 1)
    saved = here.state()
    here()
    once = here.state()
    for (name, ours), other in zip(weights(here).items(), weights(there).values(), strict=True):
        assert torch.allclose(ours, other, rtol=0.02, atol=5e-5), name
    if compiled_anew:
        torch.compiler.reset()
        here = steps(changed(plain, ON), 0)
    here.restore(saved)
    here()
    assert first_difference(once, here.state()) is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's compiler warns of itself
@pytest.mark.usefixtures("_traced_alone")
def test_compiled_steps_agree_and_end_with_the_same_bits_when_repeated(plain: Config) -> None:
    check_steps(plain, compiled_anew=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_steps_of_inductor_agree_and_end_with_the_same_bits_when_compiled_anew(plain: Config) -> None:
    check_steps(plain, compiled_anew=True)


def test_blocks_are_replaced_and_come_back(plain: Config) -> None:
    made: Steps = steps(plain, 0)
    unet = made.denoiser.module
    before = [(name, each.__dict__.get("forward")) for name, each in unet.named_modules()]
    undo = compiling.apply(unet)
    compiled = [each for each in unet.modules() if type(each).__name__ in compiling.REPEATED]
    assert compiled
    assert all("forward" in each.__dict__ for each in compiled)
    undo()
    assert [(name, each.__dict__.get("forward")) for name, each in unet.named_modules()] == before


def test_the_plan_is_that_of_the_code_that_is_not_compiled(plain: Config) -> None:
    runs = [TracedRun(config=each, model=model_of(plain), card=CPU_CARD) for each in (plain, changed(plain, ON))]
    one, other = (trace_train(run).peak.total for run in runs)
    assert one == other


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no model has a block that is compiled; allowed: Basic"):
        compiling.apply(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"training\.compile: true has not been tested with LoRA"):
        load_config(None, list((NEEDED | ON | {"lora.enabled": True}).items()))
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(DependencyError, match=r"training\.compile: .* C\+\+ compiler"):
        compiling.check(torch.device("cpu"))
