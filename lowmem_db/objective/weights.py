"""Weights of the loss at each timestep, as one table for every scheme."""

import torch
from jaxtyping import Float
from torch import Tensor

from lowmem_db.errors import ConfigError

MAX_DEBIASED_SNR = 1000.0


def signal_to_noise_ratio(alphas_cumprod: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Return alphas_cumprod / (1 - alphas_cumprod) in float64 (arXiv:2303.09556, section 3.1)."""
    alphas = alphas_cumprod.double()
    return alphas / (1 - alphas)


def timestep_weights(
    alphas_cumprod: Float[Tensor, " t"], prediction_type: str, *, snr_gamma: float | None, debiased: bool
) -> Float[Tensor, " t"]:
    """Return the fp32 weight of the loss at each timestep.

    Min-SNR (arXiv:2303.09556, section 3.4) weighs the error of the predicted sample by min(SNR, gamma): for epsilon
    that is min(SNR, gamma) / SNR, for v_prediction min(SNR, gamma) / (SNR + 1). At SNR = 0 the first has the limit 1.

    Debiased estimation (arXiv:2310.08442) weighs the error of epsilon by 1 / sqrt(SNR), the SNR cut at 1000; for
    v_prediction by 1 / (SNR + 1), as sd-scripts does, whose settings users bring along.

    Args:
        alphas_cumprod: The noise schedule.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.
        snr_gamma: Gamma of min-SNR. None: no min-SNR.
        debiased: Whether to use debiased estimation.

    Raises:
        ConfigError: A weight would be infinite: debiased epsilon on a schedule with zero terminal SNR.
    """
    snr = signal_to_noise_ratio(alphas_cumprod)
    if snr_gamma is not None:
        weights = _min_snr(snr, prediction_type, snr_gamma)
    elif debiased:
        weights = _debiased(snr, prediction_type)
    else:
        weights = torch.ones_like(snr)
    if not torch.isfinite(weights).all():
        raise ConfigError(
            f"objective.debiased: the weight of {prediction_type} is infinite where the SNR is zero; "
            "use objective.snr_gamma=5, or a model with v_prediction"
        )
    return weights.float()


def _min_snr(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    return capped / (snr + 1) if prediction_type == "v_prediction" else capped


def _debiased(snr: Tensor, prediction_type: str) -> Tensor:
    capped = snr.clamp(max=MAX_DEBIASED_SNR)
    if prediction_type == "epsilon":
        return capped.rsqrt()
    return 1 / (snr + 1) if prediction_type == "v_prediction" else capped.sqrt()
