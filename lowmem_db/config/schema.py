"""The configuration: one frozen tree, with a description under each field; unknown keys are refused.

Nothing here imports torch, so that the command line answers at once. :mod:`lowmem_db.config.rules` lists the
combinations of fields that are refused.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lowmem_db.config.sizes import parse_bytes
from lowmem_db.environment import check_device_name


def _expand_home(path: Path) -> Path:
    """Expand a leading ``~``, because no shell does so in a YAML file or after ``--flag=``."""
    try:
        return path.expanduser()
    except RuntimeError:  # unknown user
        return path


def _unquoted_no(value: object) -> object:
    """Keep ``no`` as a word, because YAML reads it as false."""
    return "no" if value is False else value


def _read_budget(value: object) -> object:
    """Turn a size into bytes; keep ``auto``."""
    return value if value == "auto" else parse_bytes(value)


def _one_word(text: str) -> str:
    if len(text.split()) != 1 or text != text.strip():
        raise ValueError("it must be one word, without spaces")
    return text


def _refuse_rounded_bf16(value: object) -> object:
    """Explain why weights that are rounded to the nearest bf16 do not train."""
    if value == "bf16":
        raise ValueError(
            "weights rounded to the nearest bf16 lose small updates (at a learning rate of 2e-6 only 2.6 % of them can "
            "move); use bf16_extra_bits, bf16_stochastic or fp32"
        )
    return value


LocalPath = Annotated[Path, AfterValidator(_expand_home)]
PositiveInt = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=1, le=1024)]
NumImages = Annotated[int, Field(ge=1, le=100_000)]
NumSteps = Annotated[int, Field(ge=1, le=1_000_000)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Precision = Literal["fp32", "fp16", "bf16"]
Sampler = Literal["ddpm", "ddim", "dpm_solver"]
Weights = Literal["fp32", "bf16_extra_bits", "bf16_stochastic"]
Placement = Literal["none", "layers", "segments", "nested"]
BaseWeights = Literal["fp32", "fp16", "bf16", "int8", "nf4"]
Scheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
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
    """``demo`` (the small model in this package), ``demo_if`` and ``demo_if_ii`` (the two stages of a small one in
    DeepFloyd IF's layout), a folder in diffusers' layout, a single ``.safetensors`` file in the original layout (Stable
    Diffusion 1.x, 2.x, XL), or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Variant of the weight files, such as ``fp16``."""
    content_key: str | None = None
    """Key of the model's bytes: another model in its place is refused. A run writes it into its ``config.yaml``."""
    allow_pickle: bool = False
    """Also load pickled weights (``.bin``), with ``weights_only=True``. Default: only safetensors."""
    embeddings: Annotated[
        tuple[Annotated[str, AfterValidator(lambda path: str(_expand_home(Path(path))))], ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    ] = ()
    """Learned embeddings (Textual Inversion) whose words prompts may use: finished runs, or files in the formats of
    diffusers, AUTOMATIC1111 and ComfyUI; pickled ones (``.pt``, ``.bin``) are read with ``weights_only=True``."""
    vae: str | None = None
    """Another autoencoder, for training and in the final model: a folder in diffusers' layout, a ``.safetensors`` file,
    or a hub id such as ``madebyollin/sdxl-vae-fp16-fix``. Default: the model's own."""
    clip_skip: PositiveInt | None = None
    """Layer of the text encoders that the model reads, counted from the end as other programs do: 2 is the last but
    one. Default: what the family was trained with, 1 for Stable Diffusion 1.x, 2 for 2.x and XL."""
    prompt_chunks: PositiveInt = 1
    """Chunks of 75 tokens in which prompts are read, as other programs do with long prompts; shorter ones are
    padded."""
    attention_mask: bool | None = None
    """Whether the text encoder ignores padding. Default: as the model was trained, true for DeepFloyd IF and false for
    Stable Diffusion; the other value is refused."""


class ConceptConfig(Section):
    """A further subject of a run."""

    instance_dir: LocalPath
    """Folder of its photos."""
    instance_prompt: str
    """Its prompt, with an identifier of its own."""
    class_prompt: str | None = None
    """The prompt of its class."""
    class_dir: LocalPath | None = None
    """Folder of its class images, as in ``prior.class_dir``."""
    repeats: PositiveInt = 1
    """How often its photos are seen compared with those of the first subject."""


class SubjectConfig(Section):
    """The photos of the subject and their prompts."""

    instance_dir: LocalPath
    """Folder of photos. A text file beside a photo, with the same name, replaces the prompt for that photo."""
    instance_prompt: str
    """Prompt with a rare identifier and the class noun: ``a sks dog``."""
    class_prompt: str | None = None
    """Prompt for the class, without the identifier: ``a dog``. Required for prior preservation."""
    concepts: tuple[ConceptConfig, ...] = ()
    """Further subjects that train in the same run: a list of ``instance_dir``, ``instance_prompt`` and, as needed,
    ``class_prompt``, ``class_dir`` and ``repeats``. There are ``prior.num_class_images`` for each class."""


class DataConfig(Section):
    """How photos become training samples."""

    resolution: Pixels = 512
    """Length of the shorter side in pixels; a multiple of 8."""
    crop: Literal["random", "center"] = "random"
    """Where to crop the square from an image that is not square."""
    num_crops: BatchSize = 4
    """Number of random crops per image that are encoded; images that need no cropping have one."""
    aspect_ratio_buckets: bool = False
    """Train each image close to its own aspect ratio, with about ``resolution`` squared pixels, not in a square.
    All images in a batch have the same size; class images are drawn at the sizes of the photos."""
    bucket_step: Pixels | None = None
    """Sides of buckets are multiples of this. Default: 64 for 512 pixels and more, else the model's smallest step."""
    min_bucket_side: Pixels | None = None
    """Shortest side of a bucket in pixels. Default: half of ``resolution``."""
    max_bucket_side: Pixels | None = None
    """Longest side of a bucket in pixels. Default: twice ``resolution``."""
    random_flip: bool = False
    """Mirror half of the samples, drawn anew each time; not for subjects with a left and a right."""
    repeats: dict[str, PositiveInt] = {}
    """How often photos are seen compared with the others, by shell patterns of their file names: ``{face*.jpg: 3}``."""
    shuffle_tags: bool = False
    """Shuffle the tags of captions, that is, what is between commas."""
    keep_tags: Annotated[int, Field(ge=0)] | None = None
    """The first so many tags stay in their places and are never left out. Default: none."""
    tag_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the other tags that is left out."""
    num_caption_variants: PositiveInt | None = None
    """Number of orders and omissions of each caption that are encoded; a sample draws one of them. Default: 16."""


class PriorConfig(Section):
    """Prior preservation (arXiv:2208.12242, section 3.3)."""

    enabled: bool = True
    """Train on class images together with the photos."""
    loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Lambda of Equation 2."""
    num_class_images: NumImages = 200
    """Number of class images; the paper draws about 1000."""
    class_prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Further prompts of class images, in turn with ``subject.class_prompt``; each image trains with its own, so that
    other nouns (``a cat``) stay themselves. What stands here twice is drawn twice as often."""
    class_dir: LocalPath | None = None
    """Folder of class images. A folder with your own pictures is used as it is. Default: in the cache, by content."""
    sampler: Sampler = "ddpm"
    """Sampler for class images; the paper uses the ancestral one, ``ddpm``."""
    num_inference_steps: NumSteps = 50
    """Sampling steps for class images."""
    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance for class images."""
    sample_batch_size: BatchSize = 4
    """Class images drawn at once."""
    precision: Precision | None = None
    """Type in which the frozen model draws class images. Default: fp16 on CUDA devices, fp32 on the CPU."""


class TrainingConfig(Section):
    """The training loop."""

    max_train_steps: NumSteps = 800
    """Optimizer steps."""
    train_batch_size: BatchSize = 1
    """Photos per batch; prior preservation adds as many class images."""
    gradient_accumulation_steps: NumSteps = 1
    """Batches per optimizer step and process."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """Learning rate of the UNet."""
    learning_rate_text_encoder: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the text encoder. Default: the same as the UNet's."""
    learning_rate_text_encoder_2: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of SDXL's second text encoder. Default: the same as the first one's."""
    scale_learning_rate: bool = False
    """Multiply the learning rates by the photos per optimizer step: batch size, accumulation steps and processes."""
    lr_scheduler: Scheduler = "constant"
    """Learning rates after the warm-up: constant, under two names, or falling to zero; ``polynomial`` falls to
    1e-7."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rates rise."""
    lr_warmup_from_zero: bool = False
    """Start the warm-up at zero, as diffusers does: the factor is s/N in step s = 0, 1, ... of N. Default: (s+1)/(N+1),
    so that the first step trains too."""
    lr_num_cycles: PositiveInt = 1
    """How often ``cosine_with_restarts`` falls to zero."""
    lr_power: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of ``polynomial``."""
    train_text_encoder: bool = False
    """Train the text encoder too; for SDXL, both text encoders."""
    layers: tuple[str, ...] = ()
    """Layers to train in a full fine-tuning, as shell patterns of names: ``[unet.*.attn2.*]``. Default: all layers."""
    stop_text_encoder_training: PositiveInt | None = None
    """Step after which the text encoder stops training. Default: never."""
    clipping: Clipping | None = None
    """What is clipped: ``global``, the joint norm of all gradients; in the backward pass ``update_rms``, the root mean
    square of each tensor's update (arXiv:1804.04235, section 6), ``lagged``, all gradients by the average of past joint
    norms, or ``per_tensor``, the norm of each gradient by itself; ``none``. Default: ``global`` after the backward
    pass; in it ``update_rms``, or ``lagged`` if ``max_grad_norm`` is not 1.0."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm for ``global``, ``lagged`` and ``per_tensor``; null turns clipping off."""
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(_unquoted_no)] | None = None
    """Type the model computes in; ``no`` is fp32. Default: bf16 on cards that support it, fp16 on older ones, ``no`` on
    the CPU."""
    allow_tf32: bool = False
    """Let CUDA devices multiply fp32 matrices in TF32."""
    compile: bool = False
    """Compile the residual and transformer blocks with ``torch.compile``, which takes minutes before the first steps.
    Results differ from those without it in the last bits. No gain has been measured on a card yet."""


class ObjectiveConfig(Section):
    """The loss (arXiv:2208.12242, Equation 2)."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the denoiser predicts. Default: the value in the model's scheduler."""
    zero_terminal_snr: bool | None = None
    """Rescale the noise schedule so that the last timestep is pure noise (arXiv:2305.08891, section 3.1); needs
    ``v_prediction`` or ``sample``. Default: the value in the model's scheduler."""
    loss: Literal["mse", "huber", "l1"] = "mse"
    """Distance between prediction and target; ``huber`` is the pseudo-Huber loss."""
    huber_c: Annotated[float, Field(gt=0)] = 0.1
    """Where the pseudo-Huber loss turns from square to linear."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Gamma of the min-SNR loss weighting (arXiv:2303.09556); 5 is usual. Default: all timesteps have equal weight."""
    debiased: bool = False
    """Use the loss weighting of debiased estimation (arXiv:2310.08442)."""
    noise_offset: Annotated[float, Field(ge=0)] = 0.0
    """Strength of noise that is constant over each channel of a sample."""
    input_perturbation: Annotated[float, Field(ge=0)] = 0.0
    """Strength of noise that is added to the input but not to the target (arXiv:2301.11706)."""
    conditioning_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of samples trained with the empty prompt."""
    variance: Literal["frozen", "hybrid"] = "frozen"
    """Whether the variance that DeepFloyd IF predicts trains too, with the hybrid loss (arXiv:2102.09672, Eq. 16);
    without a loss of its own it drifts, and a trained model is drawn with a fixed one."""
    vlb_weight: Annotated[float, Field(gt=0)] = 1e-3
    """Lambda of the hybrid loss: the weight of the variational lower bound."""


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """``adamw8bit`` keeps its states in 8 bits, ``adafactor`` only factored second moments (arXiv:1804.04235)."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """Decoupled weight decay."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685), which train in fp32 while the weights are frozen."""

    enabled: bool = False
    """Train adapters instead of the weights; with ``training.train_text_encoder``, in the text encoder too."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Adapters are scaled by ``alpha / rank``. Default: the rank, so that the scale is 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of an adapter's inputs that are dropped in training."""
    rank_stabilized: bool = False
    """Scale adapters by ``alpha / sqrt(rank)`` instead (arXiv:2312.03732)."""
    dora: bool = False
    """Also train the norm of each row of the adapted weights (DoRA, arXiv:2402.09353)."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attention",)
    """What gets adapters: ``attention``, ``feed_forward``, ``convolutions``, or shell patterns of layer names:
    ``unet.mid_block.*``."""
    base_weights: BaseWeights | None = None
    """Type of the frozen weights; ``int8`` and ``nf4`` (arXiv:2305.14314) need bitsandbytes and a CUDA device. Default:
    fp32 on the CPU; on a card bf16, or fp16 if it does not support that; ``nf4`` if neither fits."""


class TextualInversionConfig(Section):
    """Textual Inversion (arXiv:2208.01618): the embedding of a new word trains, and nothing else.

    ``lora.base_weights`` is the type of the frozen weights. Prior preservation is off, because no weight changes.
    """

    enabled: bool = False
    """Learn an embedding instead of changing the weights."""
    token: Annotated[str, AfterValidator(_one_word)] = "<subject>"
    """Spelling of the new word, without spaces; prompts use it: ``a <subject>``."""
    initializer: str | None = None
    """Word that the embedding starts as, one token such as ``dog``. Default: the last word of
    ``subject.class_prompt``."""
    num_vectors: Annotated[int, Field(ge=1, le=75)] = 1
    """Number of tokens that the word stands for, each with an embedding of its own."""
    templates: Literal["object", "style", "prompt"] = "object"
    """Prompts of the photos: one of the templates of the paper for objects or for styles, drawn for each sample;
    or ``prompt``, always ``subject.instance_prompt``. A photo with its own caption keeps that."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """Learning rate of the embedding."""


class SuperResolutionConfig(Section):
    """How a super-resolution model is fine-tuned: on photos and their low-resolution versions."""

    noise_augmentation: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-5
    """Variance of the noise on the low-resolution pictures, in their scale of [-1, 1]. The paper lowers it from 1e-3 to
    1e-5 for fine details of the subject."""
    low_resolution: Pixels | None = None
    """Height and width of the low-resolution pictures. Default: a quarter of ``data.resolution``."""


class EmaConfig(Section):
    """Exponential moving average of the weights, in fp32; samples and the final model use it."""

    enabled: bool = False
    """Keep the average."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Final decay; it rises to this value over the first steps."""


class MemoryConfig(Section):
    """How the run saves memory. The planner fills in what is left out: the fastest strategy that fits the budget."""

    budget: Annotated[Literal["auto"] | Annotated[int, Field(gt=0)], BeforeValidator(_read_budget)] = "auto"
    """Device memory that the run may use: ``8GiB`` (or ``8``, ``8G``, ``8GB``), or ``auto`` for all that is free."""
    weights: Annotated[Weights, BeforeValidator(_refuse_rounded_bf16)] | None = None
    """Type of the weights that train: ``fp32``; ``bf16_extra_bits``, bf16 with eight extra bits (24-bit weights);
    ``bf16_stochastic``, bf16 with stochastic rounding."""
    optimizer_in_backward: bool | None = None
    """Step each parameter as soon as its gradient is complete, and free the gradient."""
    stream_optimizer_state: bool | None = None
    """Keep 8-bit states and extra bits in host memory; they pass through the device during the backward pass."""
    stream_weights: bool | None = None
    """Keep the weights of checkpointed segments in host memory; each segment's pass through the device while it is
    computed. Weights that train must step in the backward pass (``optimizer_in_backward``)."""
    optimizer_step: Literal["device", "host"] | None = None
    """Where the optimizer steps: ``device``; ``host``, on the processor, with ``stream_weights`` and
    ``stream_optimizer_state``: gradients go out and weights come in, for cards behind few PCIe lanes. Results of a card
    and of the processor differ by rounding."""
    checkpointing: Placement | Annotated[dict[str, Placement], Field(min_length=1)] | None = None
    """Activation checkpointing, that is, what is recomputed in the backward pass: ``none``; ``layers``, each residual
    block and transformer block by itself; ``segments``, longer stretches with whole transformers and skip connections;
    ``nested``, segments with checkpoints inside transformers. A mapping sets it per block:
    ``{unet.up_blocks.3: segments}``."""
    offload_checkpoints: bool | None = None
    """Keep the inputs of checkpointed segments in host memory."""
    fused_layers: bool | None = None
    """Compute GroupNorm with SiLU, and GEGLU, in one kernel each, which keeps fewer activations for the backward pass.
    Results differ from separate layers only by rounding. Default: on CUDA devices, if a faster strategy fits with it or
    nothing fits without it."""
    channels_last: bool | None = None
    """Keep the convolutions of the UNet in channels_last, together with ``fused_layers`` the layout that tensor cores
    compute in. Results differ only by rounding. A run cannot change it later. Default: with fused layers on cards that
    ``lowmem-db bench`` measured to be faster with it, of which there is none yet."""
    tiled_samples: bool | None = None
    """Draw samples during training one at a time, and decode them in tiles in the type of the weights."""
    tiled_preparation: bool | None = None
    """Before training, encode pictures and decode class images in tiles, which are blended. Latents and class images
    differ a little from those in one piece, and a run cannot change it later."""
    micro_batches: Annotated[int, Field(ge=0)] | None = None
    """Compute each batch in so many parts, one after the other, and step on the mean of their gradients, with the noise
    that the whole batch would have. Results differ only by rounding. Default: 0, batches as a whole, until memory runs
    out."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention implementation. torch's SDPA takes the fastest kernel of the card that computes the same bits each
    time, and needs no other package; xformers needs a CUDA device."""
    techniques: dict[str, bool | int | float | str | None] = {}
    """Values for techniques that other packages register, by name."""


class CheckpointingConfig(Section):
    """Checkpoints, from which a run can be resumed."""

    every: PositiveInt = 500
    """Steps between checkpoints; the last step always has one."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 15.0
    """Also save a checkpoint when the last one is so many minutes old; null does not."""
    keep: PositiveInt | None = 2
    """How many complete checkpoints to keep; null keeps all, except those that were made only for samples."""
    copy_to: LocalPath | None = None
    """Folder on another disk, such as Google Drive, for a copy of the newest checkpoint, the samples and the log. With
    ``--resume``, a run that is gone from ``output_dir`` goes on from there."""


class SamplingConfig(Section):
    """Samples during training, drawn with the model in memory, always after a checkpoint."""

    prompts: tuple[str, ...] = ()
    """Prompts to draw. Default: no samples."""
    negative_prompt: str = ""
    """What the images should not show: takes the place of the empty prompt in guidance, also in scores."""
    at_start: bool = False
    """Also draw samples before the first step, with the model as it was."""
    every: PositiveInt | None = None
    """Steps between samples. Default: at every checkpoint."""
    num_images: BatchSize = 4
    """Images per prompt."""
    sampler: Sampler = "ddim"
    """Sampler for the samples."""
    num_inference_steps: NumSteps = 25
    """Sampling steps."""
    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance (arXiv:2207.12598)."""
    seed: int = 0
    """Seed of the samples; the same at every step, so that they can be compared."""


class EvaluationConfig(Section):
    """Scores during training: images are drawn with the settings in ``sampling`` and compared with the photos.

    A score is the similarity of the images to the photos, minus that of images for the class prompt if there is one.
    """

    every: PositiveInt | None = None
    """Steps between scores; each of these steps has a checkpoint. Default: no scores."""
    prompts: tuple[str, ...] = ()
    """Prompts whose images should show the subject. Default: the instance prompt."""
    encoder: str = "en0"
    """Image encoder: ``en0``, ``identity``, ``dino`` or ``clip``; NAME=FOLDER_OR_HUB_ID chooses the model."""
    keep_best: bool = True
    """Keep the checkpoint with the highest score (the first one among equals) and make it the final model."""
    patience: PositiveInt | None = None
    """Stop after so many scores in a row without a new best. Default: train to the last step."""


class DistributedConfig(Section):
    """Several processes, started by torchrun or accelerate launch, that share each optimizer step."""

    reduce: Literal["sum", "ordered"] | None = None
    """How gradients are added up: ``sum``, once per step in an order that the library chooses; ``ordered``, after every
    batch and by rank, which gives the bits of one process that accumulates as many batches, for any number of processes
    and with that much more traffic. Default: ``sum``, but ``ordered`` for two processes that accumulate batches; for
    two that do not, both give the same bits. With ``sharding: full``, two always add up in order, which costs no more
    traffic there, except that the norms of clipping are computed from whole gradients."""
    sharding: Literal["none", "full"] = "none"
    """What each process holds of the model: ``none``, all of it; ``full``, a part of the weights, gradients and
    optimizer states, for models that do not fit one card (FSDP2, arXiv:2304.11277). The weights of a layer are put
    together while it computes."""
    num_processes: PositiveInt = 1
    """How many there are: the launcher says it, and a run writes it down; ``lowmem-db plan --num-processes`` plans for
    it. Each of them computes ``training.gradient_accumulation_steps`` batches of ``training.train_batch_size``."""


class FinalConfig(Section):
    """The final model."""

    layout: Literal["folder", "flat"] = "folder"
    """Where the final model lies: ``folder``, in ``final/``; ``flat``, also in ``output_dir`` itself, where scripts for
    diffusers look for it. Both share their bytes on disks that support hard links."""
    precision: Precision = "fp32"
    """Type of the trained weights in ``final/``."""
    push_to_hub: bool = False
    """Upload ``final/`` to the Hugging Face hub when the run is done; needs ``hf auth login``."""
    hub_model_id: str | None = None
    """Repository on the hub. Default: the name of ``output_dir``."""


class LoggingConfig(Section):
    """Logs in addition to ``metrics.jsonl``."""

    tensorboard: bool | None = None
    """Write TensorBoard event files. Default: if tensorboard is installed."""
    wandb: bool | None = False
    """Send curves, samples and scores to Weights & Biases; null: if wandb is installed."""
    wandb_project: str = "lowmem-db"
    """Project there; a run is named after ``output_dir``."""


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
    """Seed of all random numbers of the run."""
    device: Annotated[str, AfterValidator(check_device_name)] = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    cache_dir: LocalPath = Field(default_factory=default_cache_dir)
    """Cache of class images, latents and text embeddings, shared by all runs. Default: the environment variable
    ``LOWMEM_DB_CACHE``, or ``~/.cache/lowmem-db``."""
    data: DataConfig = DataConfig()
    prior: PriorConfig = PriorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    textual_inversion: TextualInversionConfig = TextualInversionConfig()
    super_resolution: SuperResolutionConfig = SuperResolutionConfig()
    ema: EmaConfig = EmaConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distributed: DistributedConfig = DistributedConfig()
    final: FinalConfig = FinalConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="before")
    @classmethod
    def _without_prior(cls, tree: Any) -> Any:
        """Leave prior preservation off for Textual Inversion, unless it is asked for."""
        if not isinstance(tree, dict) or not isinstance(own := tree.get("textual_inversion"), dict):
            return tree
        prior = tree.get("prior", {})
        if own.get("enabled") in (True, "true") and isinstance(prior, dict) and "enabled" not in prior:
            return tree | {"prior": {**prior, "enabled": False}}
        return tree

    @property
    def trains_weights(self) -> bool:
        """Whether the model's own weights train, rather than adapters or an embedding."""
        return not (self.lora.enabled or self.textual_inversion.enabled)

    @property
    def runs_text_encoders(self) -> bool:
        """Whether training steps run the text encoders, because something in them trains."""
        return self.training.train_text_encoder or self.textual_inversion.enabled

    @property
    def initializer(self) -> str | None:
        """Word that the embedding of Textual Inversion starts as, or None if it is not known."""
        words = (self.subject.class_prompt or "").split()
        return self.textual_inversion.initializer or (words[-1] if words else None)

    @property
    def subjects(self) -> tuple[ConceptConfig, ...]:
        """All subjects, the first one from the fields of ``subject`` and ``prior``."""
        first = ConceptConfig(
            instance_dir=self.subject.instance_dir,
            instance_prompt=self.subject.instance_prompt,
            class_prompt=self.subject.class_prompt,
            class_dir=self.prior.class_dir,
        )
        return (first, *self.subject.concepts)

    def of_subject(self, number: int) -> "Config":
        """Return the configuration as if it had only one of its subjects."""
        own = self.subjects[number]
        subject = SubjectConfig(
            instance_dir=own.instance_dir, instance_prompt=own.instance_prompt, class_prompt=own.class_prompt
        )
        prior = self.prior.model_copy(update={"class_dir": own.class_dir})
        return self.model_copy(update={"subject": subject, "prior": prior})

    @property
    def evaluation_prompts(self) -> tuple[str, ...]:
        """Prompts whose scored images should show the subject."""
        return self.evaluation.prompts or (self.subject.instance_prompt,)

    @property
    def prompts_scored(self) -> frozenset[str]:
        """Prompts whose images are scored during training, including the class prompt; empty without scores."""
        if self.evaluation.every is None:
            return frozenset()
        return frozenset({*self.evaluation_prompts, self.subject.class_prompt or ""} - {""})

    @property
    def prompts_drawn(self) -> frozenset[str]:
        """Prompts that images during training need, the negative one included."""
        drawn = self.prompts_scored | set(self.sampling.prompts)
        return drawn | {self.sampling.negative_prompt} if drawn else drawn

    @property
    def samples_per_step(self) -> int:
        """Number of photos per optimizer step, over all processes."""
        batches = self.training.gradient_accumulation_steps * self.distributed.num_processes
        return self.training.train_batch_size * batches
