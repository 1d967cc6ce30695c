"""The final model of a run."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from lowmem_db.adaptation.lora_file import read_lora
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.exporting.lora import LoraSource, export_lora, is_dora
from lowmem_db.models.copying import SAMPLES_FILE
from lowmem_db.models.embedding_file import write_words
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.saving import forget_places
from lowmem_db.run.model_card import CARD_FILE, model_card
from lowmem_db.run.publishing import shareable_copy
from lowmem_db.storage import hub
from lowmem_db.storage.atomic import write_text
from lowmem_db.storage.checksums import write_checked_folder
from lowmem_db.storage.mirroring import mirror
from lowmem_db.storage.places import LORA_FILE
from lowmem_db.training.trainer import Trainer


def write_final(trainer: Trainer, model: ModelFolder) -> None:
    """Write ``final/``, for ``from_pretrained`` or, for a LoRA, ``load_lora_weights``; upload it if asked to.

    With ``final.layout=flat`` its files also lie in the run folder itself.

    Raises:
        StorageError: The disk is full, or the upload failed.
    """
    write_checked_folder(trainer.run.final_dir, partial(_save_final, trainer, model))
    if trainer.config.final.layout == "flat":
        mirror(trainer.run.final_dir, trainer.run.root)
    if trainer.config.final.push_to_hub:
        model_id = trainer.config.final.hub_model_id or trainer.config.output_dir.absolute().name
        with shareable_copy(trainer.run) as folder:
            say(f"uploaded to {hub.upload_model(folder, model_id, trainer.run.final_dir)}")


def _save_final(trainer: Trainer, model: ModelFolder, folder: Path) -> None:
    extra_bits = trainer.optimizer.extra_bits()
    if trainer.ema is not None:  # the average is kept in full precision
        extra_bits = {name: bits for name, bits in extra_bits.items() if name not in trainer.ema.parameters}
    with nullcontext() if trainer.ema is None else trainer.ema.applied(torch.float32):
        trainer.adaptation.write(folder, model, trainer.trained_modules, extra_bits)
    write_words(folder, model.words)
    has_samples = _add_samples(folder, trainer.run.newest_sample("grid.png", step=trainer.step))
    card = model_card(trainer.config, model, trainer.adaptation.noun, trainer.step, has_samples=has_samples)
    write_text(folder / CARD_FILE, card)
    forget_places(folder)
    if (folder / LORA_FILE).is_file() and model.family.lora_prefixes:
        _add_layout_of_other_programs(folder, trainer.config, trainer.run.newest_sample(step=trainer.step))


def _add_samples(folder: Path, grid: Path | None) -> bool:
    """Write the last samples beside the card, if there are some."""
    if grid is None:
        return False
    with Image.open(grid) as picture:
        picture.convert("RGB").save(folder / SAMPLES_FILE, quality=90)
    return True


def _add_layout_of_other_programs(folder: Path, config: Config, sample: Path | None) -> None:
    """Write a LoRA in kohya's layout too: other programs load only half of diffusers'. A DoRA has to be exported."""
    name = config.output_dir.absolute().name
    source = LoraSource(name=name, lora=read_lora(folder / LORA_FILE), config=config, sample=sample)
    if not is_dora(source.lora):
        export_lora(source, folder / f"{name}-lora-kohya.safetensors", "lora-kohya")
