"""Trains a stage of the small cascade on stored pictures, for a given processor time; resumable in pieces.

The first stage trains the text encoder too; the second takes it as it is.
"""

import argparse
import copy
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnAddedKVProcessor
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.demo_base.captions import Attributes, compose_caption
from benchmarks.demo_base.train import LatentStore, draw_timesteps
from benchmarks.demo_cascade.parts import SIZES, build_scheduler, build_text_encoder, build_unet, write_stage
from lowmem_db.models.families.t5 import load_t5_tokenizer, tokenize
from lowmem_db.models.files import ModelFiles
from lowmem_db.objective.low_resolution import enlarged, level_of, reduced

LEAST, MOST = 1e-5, 1e-1
"""Variances of the noise on the pictures that the second stage enlarges; each is drawn between them, in logarithms."""
_DROPOUT = 0.1


def filler_words(tokenizer: Any) -> list[str]:
    """Returns words that are one piece of T5's, to stand before a noun as an identifier does."""
    words = [piece[1:] for piece in tokenizer.get_vocab() if piece[0] == "\u2581"]
    return sorted(word for word in words if word.isascii() and word.isalpha() and word.islower() and len(word) > 2)


def reduced_bytes(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Returns pictures (3, 16, 16) of others (3, 64, 64), all of bytes."""
    found: list[np.ndarray] = []
    for start in range(0, len(pictures), 256):
        large = torch.from_numpy(np.stack(pictures[start : start + 256])) / 127.5 - 1
        found.extend(((reduced(large, SIZES[1]) + 1) * 127.5).round().to(torch.uint8).numpy())
    return found


class Trainer:
    """A stage, its optimizer and its moving average, with one method per step."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.scheduler = build_scheduler(args.stage)
        self.tokenizer = load_t5_tokenizer(ModelFiles(path=args.tokenizer.parent), args.tokenizer.name)
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        unet = build_unet(args.stage, args.channels)
        unet.set_attn_processor(AttnAddedKVProcessor())  # torch's fused kernel is slow for few queries on a CPU
        parts: dict[str, nn.Module] = {"unet": unet}
        if args.stage == 1:
            parts["text_encoder"] = self.text_encoder
        else:
            state = torch.load(args.first / "state.pt")["ema"]
            own = {name.removeprefix("text_encoder."): rows for name, rows in state.items() if "text_encoder." in name}
            self.text_encoder.load_state_dict(own)
        self.model = nn.ModuleDict(parts)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, weight_decay=0.01, fused=True)
        self.step, self.seconds = 0, 0.0
        if (args.out / "state.pt").exists():
            self.load()
        torch.manual_seed(args.seed + self.step)
        self.rng = random.Random(args.seed + self.step)
        self.store = LatentStore(args.pictures, self.rng)
        self.filler = filler_words(self.tokenizer)
        if args.stage == 1:
            self.store.latents = reduced_bytes(self.store.latents)

    def load(self) -> None:
        """Continues from a saved state."""
        state = torch.load(self.args.out / "state.pt")
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Writes the state, replacing the last one only when complete."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        partial = self.args.out / "state.tmp"
        torch.save(state | {"step": self.step, "seconds": self.seconds}, partial)
        partial.rename(self.args.out / "state.pt")

    def loss(self) -> Tensor:
        """Returns the loss of one batch: the error of v; the variance has none."""
        stored, shown = self.store.batch(self.args.batch)
        pictures, levels, beside = stored / 127.5 - 1, None, None
        if self.args.stage == 2:
            beside, levels = self.beside(reduced(pictures, SIZES[1]))
            pictures, beside = self.cropped(pictures, beside)
        noise, timesteps = torch.randn_like(pictures), draw_timesteps(len(pictures), 1.0)
        noisy = self.scheduler.add_noise(pictures, noise, timesteps)
        target = self.scheduler.get_velocity(pictures, noise, timesteps)
        if beside is not None:
            noisy = torch.cat([noisy, beside], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            embeds = self.embeds(shown)
            predicted = self.model["unet"](noisy, timesteps, encoder_hidden_states=embeds, class_labels=levels).sample
        return mse_loss(predicted[:, :3].float(), target)

    def embeds(self, shown: list[Attributes]) -> Tensor:
        """Returns the embedded captions of pictures, some of them empty."""
        captions = [
            "" if self.rng.random() < _DROPOUT else compose_caption(each, self.rng, self.filler) for each in shown
        ]
        tokens = tokenize(self.tokenizer, captions)
        return self.text_encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state

    def beside(self, small: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the pictures to enlarge, each with noise of its own variance, and the levels of these."""
        powers = torch.rand(len(small)) * math.log(MOST / LEAST) + math.log(LEAST)
        variances, large = powers.exp(), enlarged(small, (SIZES[2], SIZES[2]))
        levels = [level_of(variance, self.scheduler.alphas_cumprod) for variance in variances.tolist()]
        rows = variances.view(-1, 1, 1, 1)
        return (1 - rows).sqrt() * large + rows.sqrt() * torch.randn_like(large), torch.tensor(levels)

    def cropped(self, *pictures: Tensor) -> list[Tensor]:
        """Returns the same part of pictures, from which the second stage learns as much: details are local."""
        side = self.args.crop or SIZES[2]
        top, left = (self.rng.randint(0, SIZES[2] - side) for _ in range(2))
        return [each[..., top : top + side, left : left + side] for each in pictures]

    def update(self, progress: float) -> float:
        """Takes one optimizer step at the given share of the planned time and returns the loss."""
        rate = self.args.lr * min(1.0, (self.step + 1) / 50) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.args.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.item()

    def run(self) -> None:
        """Trains until the planned minutes, counted over all runs, or those of this piece are used up.

        The state is saved and the average written as a model, also after a piece.
        """
        planned = 60 * self.args.minutes
        end = planned if self.args.piece is None else min(planned, self.seconds + 60 * self.args.piece)
        start, earlier, recent, saved = time.process_time(), self.seconds, [], time.perf_counter()
        while self.seconds < end:
            recent.append(self.update(self.seconds / planned))
            self.seconds = earlier + time.process_time() - start
            if self.step % 50 == 0:
                print(
                    f"{self.seconds / 60:.1f} min, step {self.step}, loss {sum(recent) / len(recent):.4f}", flush=True
                )
                recent.clear()
            if time.perf_counter() - saved > self.args.save_every:
                self.save()
                saved = time.perf_counter()
        self.save()
        self.export()

    def export(self) -> None:
        """Writes the stage as a model, with the averaged weights."""
        folder = self.args.out / "base"
        shutil.rmtree(folder, ignore_errors=True)
        text_encoder = self.ema["text_encoder"] if self.args.stage == 1 else self.text_encoder
        write_stage(folder, self.args.stage, self.ema["unet"], text_encoder, self.args.tokenizer)


def main() -> None:
    """Parses the arguments and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of shards written by render.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--first", type=Path, help="--out of the first stage, whose text encoder the second takes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the state, and of the model in base/")
    parser.add_argument(
        "--minutes", type=float, required=True, help="planned processor time, over all runs; sets the decay"
    )
    parser.add_argument("--piece", type=float, help="minutes of processor time after which this run stops")
    parser.add_argument("--channels", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--bf16", action="store_true", help="autocast the forward pass to bfloat16")
    parser.add_argument("--crop", type=int, help="side of the parts that the second stage learns from")
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.channels = tuple(args.channels) if args.channels else None
    if args.stage == 2 and args.first is None:
        parser.error("--stage 2 needs --first, the --out of the first stage")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
