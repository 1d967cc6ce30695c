"""Numbers that are in range by themselves but not with the model: found before anything is drawn or trained."""

from lowmem_db.config.schema import Config, ObjectiveConfig
from lowmem_db.config.schema import Sampler as SamplerName
from lowmem_db.errors import ConfigError
from lowmem_db.models.folder import ModelFolder


def check_fits(config: Config, model: ModelFolder) -> None:
    """Refuse what the model's family cannot do, and sampling steps that its noise schedule does not have.

    Args:
        config: The configuration.
        model: The model; its configuration files are enough.

    Raises:
        ConfigError: There are some; a line for each field.
    """
    sampling, prior = config.sampling, config.prior
    asked = []
    if prior.enabled and (prior.class_dir is None or not prior.class_dir.is_dir()):
        asked.append(("prior", prior.sampler, prior.num_inference_steps, None))
    if config.prompts_drawn:
        asked.append(("sampling", sampling.sampler, sampling.num_inference_steps, config.objective))
    problems = model.family.refusals(config, model)
    problems += [
        problem
        for section, sampler, steps, objective in asked
        if (problem := too_many_steps(f"{section}.num_inference_steps", model, sampler, steps, objective))
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def too_many_steps(
    field: str, model: ModelFolder, sampler: SamplerName, steps: int, objective: ObjectiveConfig | None
) -> str | None:
    """Return a message if a number of sampling steps is larger than the model's noise schedule is long.

    Args:
        field: The field or option, for the message.
        model: The model.
        sampler: The sampler.
        steps: The number of steps.
        objective: The run's changes to the noise process. Default: none.
    """
    schedule = getattr(model.family.sampler(model, sampler, objective), "config", {})
    longest = schedule.get("num_train_timesteps")
    if longest is None or steps <= longest:
        return None
    return f"{field}: {steps} is more than the noise schedule of {model.name} has; allowed: 1 to {longest}"
