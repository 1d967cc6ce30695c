"""The three failures of figure 9 of arXiv:2208.12242 as figures: contexts not drawn, entanglement, copies of photos."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lowmem_db.evaluation.duplicates import THRESHOLD
from lowmem_db.evaluation.metrics import cosine_similarities

CONTEXT = "CLIP-T_context"
CONTEXT_FIGURES = (CONTEXT, "caption_background")
"""Shares of images in which the context of a prompt is seen."""
UNTUNED, DROP = "_untuned", "_drop"
"""Ends of the names of figures: of images that the model drew before training; lower than without a context by."""
FIDELITY = ("DINO", "CLIP-I", "EN0-I")
HALF = 0.5
_NUM_WORST = 3
Rows = Mapping[str, Mapping[str, float]]
"""Figures by prompt."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Cosines to the nearest photo of the subject.

    Attributes:
        images: Of each drawn image.
        photos: Of each photo to another one; empty if there is only one.
    """

    images: Float[Tensor, " n"]
    photos: Float[Tensor, " m"]


def find_nearest(images: Sequence[Float[Tensor, "_ d"]], photos: Float[Tensor, "m d"]) -> Nearest:
    """Return how near images come to photos, and photos to each other: a model cannot be blamed for alike photos."""
    drawn = [of_prompt for of_prompt in images if len(of_prompt)]
    among = cosine_similarities(photos, photos).fill_diagonal_(-1)
    return Nearest(
        images=cosine_similarities(torch.cat(drawn), photos).amax(dim=1) if drawn else torch.zeros(0),
        photos=among.amax(dim=1) if len(photos) > 1 else torch.zeros(0),
    )


def sees_context(
    images: Float[Tensor, "n d"], prompt: Float[Tensor, " d"], class_caption: Float[Tensor, " d"]
) -> Bool[Tensor, " n"]:
    """Return whether each image fits its prompt better than the class alone: the prompt without its context."""
    with_context, without = cosine_similarities(images, torch.stack([prompt, class_caption])).T
    return with_context > without


def failures_of(rows: Rows, nearest: Nearest | None) -> dict[str, Any]:
    """Return the failures of one subject, each None where the figures for it are missing.

    Returns:
        JSON values. ``context``: the prompts whose context is seen in less than half of their images, with the paper's
        reason (a weak prior, or a subject and context that are seldom together) where images of the untuned model say
        which. ``entanglement``: how much lower fidelity is than without a context. ``copies``: how many images are as
        near to a photo as near-duplicates are.
    """
    return {"context": _context(rows), "entanglement": _entanglement(rows), "copies": _copies(rows, nearest)}


def failure_lines(name: str, failures: Mapping[str, Any]) -> list[str]:
    """Return the failures of a subject in words; nothing for those that are not known."""
    context, entanglement, copies = (failures[kind] for kind in ("context", "entanglement", "copies"))
    lines = []
    if context is not None:
        told = "; ".join(_in_words(each) for each in context["not_drawn"])
        lines.append(
            f"{name}: {len(context['not_drawn'])} of {context['num_prompts']} contexts are not drawn "
            f"({context['figure']} below {HALF}){': ' if told else ''}{told}"
        )
    if entanglement is not None:
        worst = "; ".join(f"{prompt} ({drop:.2f})" for prompt, drop in entanglement["most"].items())
        drop, figure = entanglement["drop"], entanglement["figure"]
        is_it = f"lower than without a context by {drop:.3f}, most"
        is_none = f"not lower than without a context (higher by {-drop:.3f}); least so"
        lines.append(f"{name}: entanglement: {figure} is {is_it if drop > 0 else is_none} in: {worst}")
    if copies is not None:
        photos = copies["nearest_photo_of_photos"]
        beside = "" if photos is None else f", of a photo to another {photos:.2f}"
        lines.append(
            f"{name}: {copies['share']:.0%} of the images are copies of a photo (cosine of {THRESHOLD} or more; on "
            f"average of an image to the nearest photo {copies['nearest_photo']:.2f}{beside})"
        )
    return lines


def _context(rows: Rows) -> dict[str, Any] | None:
    figure = next((name for name in CONTEXT_FIGURES if any(name in row for row in rows.values())), None)
    if figure is None:
        return None
    shares = {prompt: row for prompt, row in rows.items() if figure in row}
    return {
        "figure": figure,
        "num_prompts": len(shares),
        "not_drawn": [
            {"prompt": prompt, "share": row[figure], **_reason(row.get(figure + UNTUNED))}
            for prompt, row in sorted(shares.items(), key=lambda item: item[1][figure])
            if row[figure] < HALF
        ],
    }


def _reason(untuned: float | None) -> dict[str, Any]:
    if untuned is None:
        return {}
    return {"untuned": untuned, "reason": "weak prior" if untuned < HALF else "low co-occurrence"}


def _in_words(each: Mapping[str, Any]) -> str:
    why = f", before training {each['untuned']:.2f}: {each['reason']}" if "reason" in each else ""
    return f"{each['prompt']} ({each['share']:.2f}{why})"


def _entanglement(rows: Rows) -> dict[str, Any] | None:
    figure = next((name for name in FIDELITY if any(name + DROP in row for row in rows.values())), None)
    if figure is None:
        return None
    drops = {prompt: row[figure + DROP] for prompt, row in rows.items() if figure + DROP in row}
    worst = sorted(drops.items(), key=lambda item: -item[1])[:_NUM_WORST]
    return {"figure": figure, "drop": sum(drops.values()) / len(drops), "most": dict(worst)}


def _copies(rows: Rows, nearest: Nearest | None) -> dict[str, Any] | None:
    if nearest is None or not len(nearest.images):
        return None
    return {
        "share": float((nearest.images >= THRESHOLD).double().mean()),
        "nearest_photo": float(nearest.images.mean()),
        "nearest_photo_of_photos": float(nearest.photos.mean()) if len(nearest.photos) else None,
        "prompts": {prompt: row["copies"] for prompt, row in rows.items() if row.get("copies")},
    }
