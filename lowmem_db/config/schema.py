"""The configuration: one frozen tree, a text under each field, unknown keys refused.

Nothing here imports torch, so that the command line answers at once. Combinations of fields that are refused stand in
:mod:`lowmem_db.config.rules`.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from lowmem_db.config.sizes import parse_bytes


def _expand_home(path: Path) -> Path:
    """Replace a leading ``~``, which no shell does in a YAML file or behind ``--flag=``."""
    try:
        return path.expanduser()
    except RuntimeError:  # there is no such user
        return path


def _unquoted_no(value: object) -> object:
    """Take ``no`` as the word it is: YAML reads it as false."""
    return "no" if value is False else value


def _read_budget(value: object) -> object:
    """Turn a size into bytes; ``auto`` stays."""
    return value if value == "auto" else parse_bytes(value)


def _refuse_rounded_bf16(value: object) -> object:
    """Say why weights that are rounded to the nearest bf16 do not train."""
    if value == "bf16":
        raise ValueError(
            "weights rounded to the nearest bf16 lose small updates (at a learning rate of 2e-6 only 2.6 % of them can "
            "move); use bf16_extra_bits, bf16_stochastic or fp32"
        )
    return value


LocalPath = Annotated[Path, AfterValidator(_expand_home)]
PositiveInt = Annotated[int, Field(ge=1)]
Precision = Literal["fp32", "fp16", "bf16"]
Sampler = Literal["ddpm", "ddim", "dpm_solver"]
Weights = Literal["fp32", "bf16_extra_bits", "bf16_stochastic"]
Placement = Literal["none", "layers", "segments", "nested"]
BaseWeights = Literal["fp32", "fp16", "bf16", "int8", "nf4"]
Clipping = Literal["global", "update_rms", "lagged", "per_tensor", "none"]


class Section(BaseModel):
    """A part of the tree."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, validate_default=True,
        allow_inf_nan=False,
    )  # fmt: skip


class ModelConfig(Section):
    """Which model is fine-tuned."""

    base: Annotated[str, AfterValidator(lambda base: str(_expand_home(Path(base))) if base[:1] == "~" else base)]
    """``demo`` (the small model in this package), a folder in diffusers' layout, a single ``.safetensors`` file in the
    original layout (Stable Diffusion 1.x, 2.x, XL), or an id on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Variant of the weight files, for instance ``fp16``."""
    allow_pickle: bool = False
    """Also read pickled weights (``.bin``), with ``weights_only=True``; safetensors otherwise."""


class SubjectConfig(Section):
    """Photos of the subject and what they are called."""

    instance_dir: LocalPath
    """Folder of the photos; a text file of the same name beside a photo replaces the prompt for that photo."""
    instance_prompt: str
    """Prompt with a rare identifier and the class noun: ``a sks dog``."""
    class_prompt: str | None = None
    """Prompt of the class without the identifier: ``a dog``; needed for prior preservation."""


class DataConfig(Section):
    """How pictures become training samples."""

    resolution: PositiveInt = 512
    """Pixels of the shorter side; a multiple of 8."""
    crop: Literal["random", "center"] = "random"
    """Where the square is cut from a picture that is not square."""
    num_crops: PositiveInt = 4
    """How many random crops of each picture are encoded; ignored for pictures that need no cropping."""
    aspect_ratio_buckets: bool = False
    """Train each picture at the size of about ``resolution`` squared pixels that is nearest to its own shape, not in a
    square. A batch has one size; class images are drawn at the sizes of the photos."""
    bucket_step: PositiveInt | None = None
    """Sides of buckets are multiples of it. None: 64 from 512 pixels on, else the least that the model takes."""
    min_bucket_side: PositiveInt | None = None
    """Least pixels of a bucket's side. None: half of ``resolution``."""
    max_bucket_side: PositiveInt | None = None
    """Most pixels of a bucket's side. None: twice ``resolution``."""


class PriorConfig(Section):
    """Prior preservation (arXiv:2208.12242, section 3.3)."""

    enabled: bool = True
    """Train on class images beside the photos."""
    loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Lambda of Equation 2."""
    num_class_images: PositiveInt = 200
    """How many class images there shall be; the paper draws about 1000."""
    class_dir: LocalPath | None = None
    """Folder of class images. None: in the cache, by content. A folder with pictures of your own is used as it is."""
    sampler: Sampler = "ddpm"
    """Sampler of the class images; the paper uses the ancestral one, ``ddpm``."""
    num_inference_steps: PositiveInt = 50
    """Sampling steps of a class image."""
    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance of a class image."""
    sample_batch_size: PositiveInt = 4
    """Class images generated at once."""
    precision: Precision | None = None
    """Type the frozen model generates in. None: fp16 on CUDA devices, fp32 on the CPU."""


class TrainingConfig(Section):
    """The training loop."""

    max_train_steps: PositiveInt = 800
    """Optimizer steps."""
    train_batch_size: PositiveInt = 1
    """Photos in a batch; with prior preservation as many class images come on top."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches whose gradients make one optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """Learning rate of the UNet."""
    learning_rate_text_encoder: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the text encoder. None: the same as the UNet's."""
    learning_rate_text_encoder_2: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of SDXL's second text encoder. None: the same as the first one's."""
    scale_learning_rate: bool = False
    """Multiply the learning rates by the batch size and the accumulation steps."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rates after the warm-up: constant, or falling to zero."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rates rise from zero."""
    train_text_encoder: bool = False
    """Train the text encoder too; both of SDXL's."""
    layers: tuple[str, ...] = ()
    """Layers of a full fine-tuning that train, as shell patterns of their names: ``[unet.*.attn2.*]``; none: all."""
    stop_text_encoder_training: PositiveInt | None = None
    """Step after which the text encoder stays as it is. None: never."""
    clipping: Clipping | None = None
    """What is clipped: ``global``, the joint norm of all gradients; in the backward pass ``update_rms``, the root mean
    square of each tensor's update (arXiv:1804.04235, section 6), ``lagged``, all gradients by the average of past joint
    norms, or ``per_tensor``, the norm of each gradient by itself; ``none``. Default: ``global`` after the backward
    pass; in it ``update_rms``, or ``lagged`` where ``max_grad_norm`` is not 1.0."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm under ``global``, ``lagged`` and ``per_tensor``; null: no clipping."""
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(_unquoted_no)] | None = None
    """Type the model computes in; ``no`` is fp32. None: bf16 on cards that have it, fp16 on older ones, else ``no``."""
    allow_tf32: bool = False
    """Let CUDA devices multiply fp32 matrices in TF32."""


class ObjectiveConfig(Section):
    """The loss (arXiv:2208.12242, Equation 2)."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the denoiser predicts. None: as the model's scheduler says."""
    zero_terminal_snr: bool | None = None
    """Rescale the noise schedule so that the last timestep is noise alone (arXiv:2305.08891, section 3.1); needs
    ``v_prediction`` or ``sample``. None: as the model's scheduler says."""
    loss: Literal["mse", "huber", "l1"] = "mse"
    """Distance between prediction and target; ``huber`` is the pseudo-Huber loss."""
    huber_c: Annotated[float, Field(gt=0)] = 0.1
    """Where the pseudo-Huber loss turns from square to linear."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Gamma of the min-SNR weights (arXiv:2303.09556); 5 is usual. None: all timesteps weigh the same."""
    debiased: bool = False
    """Weights of the debiased estimation loss (arXiv:2310.08442)."""
    noise_offset: Annotated[float, Field(ge=0)] = 0.0
    """Strength of the noise that is constant over each channel of a sample."""
    input_perturbation: Annotated[float, Field(ge=0)] = 0.0
    """Strength of the noise that the input has and the target has not (arXiv:2301.11706)."""
    conditioning_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of samples trained with the empty prompt."""


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """``adamw8bit`` keeps its states in 8 bits, ``adafactor`` factored second moments alone (arXiv:1804.04235)."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """Decoupled weight decay."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685) that train in fp32 beside frozen weights."""

    enabled: bool = False
    """Train adapters in place of the weights; ``training.train_text_encoder`` gives the text encoder some too."""
    rank: PositiveInt = 16
    """Rank of an adapter."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """An adapter counts ``alpha / rank`` times. None: the rank, so that it counts once."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are dropped in training."""
    rank_stabilized: bool = False
    """An adapter counts ``alpha / sqrt(rank)`` times (arXiv:2312.03732)."""
    dora: bool = False
    """Also train the norm of each row of the adapted weights (DoRA, arXiv:2402.09353)."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attention",)
    """What gets adapters: ``attention``, ``feed_forward``, ``convolutions``, or shell patterns of the names of layers:
    ``unet.mid_block.*``."""
    base_weights: BaseWeights | None = None
    """Type of the frozen weights; ``int8`` and ``nf4`` (arXiv:2305.14314) need bitsandbytes and a CUDA device. None:
    fp32 on the CPU, else bf16 or, on cards without it, fp16; ``nf4`` where that does not fit."""


class EmaConfig(Section):
    """Exponential moving average of the weights, in fp32; samples and the final model use it."""

    enabled: bool = False
    """Keep the average."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Largest decay; it rises to this value over the first steps."""


class MemoryConfig(Section):
    """What saves memory. The planner chooses what is left out: the fastest strategy that fits the budget."""

    budget: Annotated[Literal["auto"] | Annotated[int, Field(gt=0)], BeforeValidator(_read_budget)] = "auto"
    """Memory of the device that the run may use: ``8GiB``, a number of bytes, or ``auto``, what is free."""
    weights: Annotated[Weights, BeforeValidator(_refuse_rounded_bf16)] | None = None
    """Weights that train: ``fp32``; ``bf16_extra_bits``, bf16 with eight more bits beside them (24-bit weights);
    ``bf16_stochastic``, bf16 with stochastic rounding."""
    optimizer_in_backward: bool | None = None
    """Step each parameter as soon as its gradient is complete, and free the gradient."""
    stream_optimizer_state: bool | None = None
    """Keep 8-bit states and extra bits in the host's memory; they pass through the device during the backward pass."""
    checkpointing: Placement | Annotated[dict[str, Placement], Field(min_length=1)] | None = None
    """Activations that are recomputed in the backward pass: ``none``; ``layers``, each residual block and transformer
    block by itself; ``segments``, with whole transformers and skip connections inside; ``nested``, twice inside
    transformers. A mapping gives a placement per block: ``{unet.up_blocks.3: segments}``."""
    offload_checkpoints: bool | None = None
    """Keep what checkpointed segments start from in the host's memory."""
    fused_layers: bool | None = None
    """Compute GroupNorm with SiLU, and GEGLU, in one kernel each, which keeps fewer activations for the backward pass.
    Results differ from those of separate layers by rounding alone. By default on CUDA devices where a faster strategy
    fits with it, or nothing fits without it."""
    tiled_samples: bool | None = None
    """Draw samples during training one at a time, and decode them in tiles in the type of the weights."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention implementation; xformers needs a CUDA device."""
    techniques: dict[str, bool | int | float | str | None] = {}
    """Values of techniques that other packages register, by their names."""


class CheckpointingConfig(Section):
    """What a run can be continued from."""

    every: PositiveInt = 500
    """Steps between checkpoints; the last step always has one."""
    keep: PositiveInt | None = 2
    """How many complete checkpoints stay on disk. None: all."""


class SamplingConfig(Section):
    """Samples during training, drawn from the model in memory, always after a checkpoint."""

    prompts: tuple[str, ...] = ()
    """Prompts to draw; none: no samples."""
    every: PositiveInt | None = None
    """Steps between samples. None: at every checkpoint."""
    num_images: PositiveInt = 4
    """Images of each prompt."""
    sampler: Sampler = "ddim"
    """Sampler of the samples."""
    num_inference_steps: PositiveInt = 25
    """Sampling steps."""
    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance (arXiv:2207.12598)."""
    seed: int = 0
    """Seed of the samples, the same at every step, so that progress can be seen."""


class EvaluationConfig(Section):
    """Scores during training: images of prompts, drawn as ``sampling`` says, compared with the photos.

    A score is the similarity of the images to the photos, less that of images of the class prompt where there is one.
    """

    every: PositiveInt | None = None
    """Steps between scores; each of these steps has a checkpoint. None: no scores."""
    prompts: tuple[str, ...] = ()
    """Prompts whose images shall show the subject. None given: the instance prompt."""
    encoder: str = "en0"
    """What compares: ``en0``, ``dino`` or ``clip``, each also as NAME=FOLDER_OR_HUB_ID."""
    keep_best: bool = True
    """Keep the checkpoint with the greatest score, the first of equal ones, and make the final model of it."""
    patience: PositiveInt | None = None
    """Stop after so many scores in a row without a new best. None: train to the last step."""


class FinalConfig(Section):
    """The model that is left when the run is done."""

    precision: Precision = "fp32"
    """Type of the trained weights in ``final/``."""
    push_to_hub: bool = False
    """Upload ``final/`` to the Hugging Face hub when the run is done; needs ``hf auth login``."""
    hub_model_id: str | None = None
    """Repository on the hub. None: the name of ``output_dir``."""


class LoggingConfig(Section):
    """What is written beside ``metrics.jsonl``."""

    tensorboard: bool | None = None
    """Write TensorBoard event files. None: where tensorboard is installed."""


def default_cache_dir() -> Path:
    """Return the cache folder: ``LOWMEM_DB_CACHE``, or ``~/.cache/lowmem-db``."""
    return Path(os.environ.get("LOWMEM_DB_CACHE") or Path.home() / ".cache" / "lowmem-db")


class Config(Section):
    """Everything a run depends on."""

    model: ModelConfig
    subject: SubjectConfig
    output_dir: LocalPath
    """Run folder: configuration, metrics, checkpoints, samples and the final model."""
    seed: int = 0
    """Seed of every random draw of the run."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    cache_dir: LocalPath = Field(default_factory=default_cache_dir)
    """Class images, latents and text embeddings, by content, for all runs; the environment's ``LOWMEM_DB_CACHE``, or
    ``~/.cache/lowmem-db``."""
    data: DataConfig = DataConfig()
    prior: PriorConfig = PriorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    ema: EmaConfig = EmaConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    final: FinalConfig = FinalConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def evaluation_prompts(self) -> tuple[str, ...]:
        """Prompts whose scored images shall show the subject."""
        return self.evaluation.prompts or (self.subject.instance_prompt,)

    @property
    def prompts_scored(self) -> frozenset[str]:
        """Prompts whose images are scored during training, that of the class too; none where there are no scores."""
        if self.evaluation.every is None:
            return frozenset()
        return frozenset({*self.evaluation_prompts, self.subject.class_prompt or ""} - {""})

    @property
    def prompts_drawn(self) -> frozenset[str]:
        """Prompts that images are drawn of during training."""
        return self.prompts_scored | set(self.sampling.prompts)

    @property
    def samples_per_step(self) -> int:
        """Number of photos that make one optimizer step."""
        return self.training.train_batch_size * self.training.gradient_accumulation_steps
