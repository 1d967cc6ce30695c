"""Trains the UNet and the text encoder of the demo base on stored latents, for a given time; resumable."""

import argparse
import copy
import json
import math
import random
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.demo_base.captions import Attributes, compose_caption
from benchmarks.demo_base.nouns import EMPHASIS

WIDTH, LENGTH = 128, 48


def build_unet(channels: tuple[int, ...]) -> UNet2DConditionModel:
    """Returns a UNet for 32-channel latents of 16x16.

    Cross-attention is at the lowest level only; the pooled caption is also added to the time embedding
    (`addition_embed_type="text"`), so that it reaches every level at little cost.
    """
    plain = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=32,
        out_channels=32,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextModel:
    """Returns a small CLIP text encoder for the tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler(zero_snr: bool = True) -> DDPMScheduler:
    """Returns Stable Diffusion's noise schedule with v-prediction.

    Args:
        zero_snr: rescale it so that the last timestep is pure noise, as at the start of sampling.
    """
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
    )


class LatentStore:
    """Latents and what they show, from the shards that exist so far."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.seen: set[Path] = set()
        self.latents: list[np.ndarray] = []
        self.shown: list[Attributes] = []
        self.weights = np.zeros(0)
        self.refresh()

    def refresh(self) -> None:
        """Takes in new shards and weighs each picture by emphasis / sqrt(pictures of its noun)."""
        names = [field.name for field in fields(Attributes)]
        for path in sorted(set(self.folder.glob("????.npy")) - self.seen):
            self.latents.extend(np.load(path))
            records = json.loads(path.with_suffix(".json").read_text())
            self.shown += [Attributes(**{name: record[name] for name in names}) for record in records]
            self.seen.add(path)
        nouns, inverse, counts = np.unique([x.noun for x in self.shown], return_inverse=True, return_counts=True)
        emphasis = np.array([EMPHASIS.get(str(noun), 1.0) for noun in nouns])
        self.weights = np.cumsum((emphasis / np.sqrt(counts))[inverse])

    def batch(self, size: int) -> tuple[Tensor, list[Attributes]]:
        """Returns (size, 32, 16, 16) latents and what they show."""
        draws = [self.rng.random() * self.weights[-1] for _ in range(size)]
        chosen = np.searchsorted(self.weights, draws)
        latents = torch.from_numpy(np.stack([self.latents[index] for index in chosen])).float()
        return latents, [self.shown[index] for index in chosen]


class CaptionTokens:
    """Tokenizes captions, remembering those seen before."""

    def __init__(self, tokenizer: CLIPTokenizer, rng: random.Random, dropout: float = 0.1) -> None:
        self.tokenizer, self.rng, self.dropout = tokenizer, rng, dropout
        self.known: dict[str, list[int]] = {}
        whole = [word[:-4] for word in tokenizer.get_vocab() if word.endswith("</w>")]
        self.filler = sorted(word for word in whole if word.isascii() and word.isalpha() and len(word) > 2)

    def __call__(self, shown: list[Attributes]) -> Tensor:
        """Returns (batch, LENGTH) token ids; a caption is left empty with the dropout's probability."""
        rows = []
        for attributes in shown:
            empty = self.rng.random() < self.dropout
            caption = "" if empty else compose_caption(attributes, self.rng, self.filler)
            if caption not in self.known:
                encoded = self.tokenizer(caption, padding="max_length", max_length=LENGTH, truncation=True)
                self.known[caption] = encoded.input_ids
            rows.append(self.known[caption])
        return torch.tensor(rows)


def draw_timesteps(size: int, shift: float) -> Tensor:
    """Returns (size,) timesteps in 0..999, moved towards noise when shift > 1."""
    uniform = (torch.arange(size) + torch.rand(size)) / size
    return (1000 * shift * uniform / (1 + (shift - 1) * uniform)).long().clamp(0, 999)


def loss_weights(timesteps: Tensor, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """Returns (batch, 1, 1, 1) min-SNR weights for v-prediction, or ones when gamma is 0."""
    if not gamma:
        return torch.ones(len(timesteps), 1, 1, 1)
    alphas = alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    return (snr.clamp(max=gamma) / (snr + 1)).view(-1, 1, 1, 1)


class Trainer:
    """Model, optimizer and moving average, with one method per step."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
        self.model = nn.ModuleDict(
            {"unet": build_unet(tuple(args.channels)), "text_encoder": build_text_encoder(tokenizer, args.text_layers)}
        )
        self.model.to(args.device)
        if args.device == "cpu":
            self.compute_attention_plainly()
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, weight_decay=0.01, fused=True)
        self.scheduler = build_scheduler(args.zero_snr)
        self.step, self.seconds = 0, 0.0
        if (args.out / "state.pt").exists():
            self.load(args.out / "state.pt")
        elif args.start_from:
            self.start_from(args.start_from)
        torch.manual_seed(args.seed + self.step)
        rng = random.Random(args.seed + self.step)
        self.store, self.tokens = LatentStore(args.latents, rng), CaptionTokens(tokenizer, rng)

    def compute_attention_plainly(self) -> None:
        """Multiplies matrices instead of calling torch's fused kernel, which is slow for 16 queries on a CPU."""
        self.model["unet"].set_attn_processor(AttnProcessor())
        self.model["text_encoder"].set_attn_implementation("eager")

    def start_from(self, base: Path) -> None:
        """Takes the weights of an exported base; step and time begin at zero."""
        for name in ("unet", "text_encoder"):
            weights = type(self.model[name]).from_pretrained(base / name, torch_dtype=torch.float32).state_dict()
            self.model[name].load_state_dict(weights)
            self.ema[name].load_state_dict(weights)

    def load(self, path: Path) -> None:
        """Continues from a saved state."""
        state = torch.load(path, map_location=self.args.device)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Writes the state, replacing the last one only when complete."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        partial = self.args.out / "state.tmp"
        torch.save(state | {"step": self.step, "seconds": self.seconds}, partial)
        partial.rename(self.args.out / "state.pt")

    def loss(self, shift: float) -> Tensor:
        """Returns the v-prediction loss of one batch, with the forward pass in bfloat16 if that was asked for."""
        latents, shown = self.store.batch(self.args.batch)
        noise, timesteps = torch.randn_like(latents), draw_timesteps(len(latents), shift)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        weights = loss_weights(timesteps, self.scheduler.alphas_cumprod, self.args.min_snr)
        place = self.args.device
        with torch.autocast(place, torch.bfloat16, enabled=self.args.bf16):
            hidden = self.model["text_encoder"](self.tokens(shown).to(place)).last_hidden_state
            prediction = self.model["unet"](noisy.to(place), timesteps.to(place), hidden).sample
        return (weights.to(place) * (prediction.float() - target.to(place)) ** 2).mean()

    def update(self, progress: float) -> float:
        """Takes one optimizer step at the given share of the planned time and returns the loss."""
        rate = self.args.lr * min(1.0, (self.step + 1) / 200) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.args.shift + progress * (self.args.final_shift - self.args.shift))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.args.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.item()

    def run(self) -> None:
        """Trains until the planned minutes, counted over all runs, are used up."""
        start, earlier, recent, saved = time.perf_counter(), self.seconds, [], time.perf_counter()
        while self.seconds < 60 * self.args.minutes:
            recent.append(self.update(self.seconds / (60 * self.args.minutes)))
            self.seconds = earlier + time.perf_counter() - start
            if self.step % 50 == 0:
                rate = self.step * self.args.batch / self.seconds
                loss = sum(recent) / len(recent)
                print(
                    f"{self.seconds / 60:.1f} min, step {self.step}, loss {loss:.4f}, {rate:.0f} images/s", flush=True
                )
                recent.clear()
            if time.perf_counter() - saved > self.args.save_every:
                self.store.refresh()
                self.save()
                saved = time.perf_counter()
        self.save()


def main() -> None:
    """Parses the arguments and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=Path, required=True, help="folder of shards written by render.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the state")
    parser.add_argument("--start-from", type=Path, help="exported base whose weights a new state begins with")
    parser.add_argument("--minutes", type=float, required=True, help="planned time, over all runs; sets the decay")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 96, 192])
    parser.add_argument("--text-layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--shift", type=float, default=1.0, help="of the timesteps at the start; above 1: more noise")
    parser.add_argument("--final-shift", type=float, help="at the end, reached evenly; the same as --shift by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast the forward pass to bfloat16")
    parser.add_argument("--zero-snr", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--min-snr", type=float, default=0.0, help="gamma of the min-SNR weights; 0: plain")
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.final_shift = args.shift if args.final_shift is None else args.final_shift
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "args.json").write_text(json.dumps(vars(args), default=str, indent=1))
    Trainer(args).run()


if __name__ == "__main__":
    main()
