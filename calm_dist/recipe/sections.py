"""The sections of a recipe and their fields: types, ranges, defaults and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    field_validator,
)

from calm_dist.heads import HeadRecipe, HeadSpec, all_specs
from calm_dist.optimizers import GROUP as OPTIMIZERS
from calm_dist.optimizers import OptimizerSpec, all_optimizers, optimizer_spec
from calm_dist.registry import known_kind
from calm_dist.schema import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Seed,
    Text,
)


class Run(Section):
    """What the run is called and where it is kept."""

    dir: Text
    """The run directory itself; it holds recipe.yaml, metrics.jsonl, checkpoints/ and logs/."""
    name: str | None = None
    """Name shown by trackers and reports, one line; the directory's own name where absent."""
    seed: Seed = 0
    """Seed of weights, noise and posterior draws."""

    continue_from: Text | None = None
    """Run directory or checkpoint of another run whose weights and optimizer state this one starts
    with, such as for a second stage on other data; see checkpoints.md. Not looked at any more once
    ``dir`` has a checkpoint of its own."""

    @property
    def display_name(self) -> str:
        """``name``, or the last part of ``dir``."""
        return self.name or Path(self.dir).name


def _of_its_kind(value: Any) -> Any:
    """The fields of a head, read as those that its kind has."""
    kind = value.get("kind", HeadRecipe().kind) if isinstance(value, dict) else None
    spec = all_specs().get(kind) if isinstance(kind, str) else None
    return value if spec is None else spec.fields.model_validate(value)


class AutoencoderSize(Section):
    """Shape of an autoencoder's token-wise and patch-wise MLP blocks."""

    hidden_size: Positive = 512
    """Width of the blocks, and of the token embedding."""
    intermediate_size: Positive = 1280
    """Inner width of the blocks' SwiGLU."""
    num_encoder_layers: Positive = 2
    """An even number: half of them work on tokens, half on patches."""
    num_decoder_layers: Positive = 2
    """An even number: half of them work on patches, half on tokens."""


class Initialization(Section):
    """How the weights of a model start."""

    init: Literal["fan_in", "released"] = "fan_in"
    """``fan_in``: std 1/sqrt(fan in); ``released``: ``initializer_range`` everywhere."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the weights with ``init: released``."""


class BackboneModel(Initialization):
    """Shape of the Llama-like Transformer that both language models share."""

    vocab_size: Positive | None = None
    """Entries of the tokenizer; taken from the data store where absent."""
    hidden_size: Positive
    """Width of the hidden states; a multiple of twice the attention heads."""
    intermediate_size: Positive
    """Inner width of the SwiGLU."""
    num_hidden_layers: Positive
    """Transformer layers, over all pipeline stages."""
    num_attention_heads: Positive
    """Attention heads of a layer; a multiple of the tensor-parallel size."""
    num_key_value_heads: Positive | None = None
    """Fewer than attention heads: grouped-query attention; as many where absent."""
    qk_norm: bool = False
    """RMSNorm on the queries and keys of each head, as in OLMo 2 and Qwen 3; steadier at high
    rates. The authors' released layout has no place for its weights."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding; a position is a step: a patch, or a token."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""

    @property
    def key_value_heads(self) -> int:
        """``num_key_value_heads``, or as many as attention heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_norm_parameters(self) -> int:
        """Weights of a layer's norms: before attention and MLP, and of queries and keys."""
        return 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)


class CalmModel(BackboneModel):
    """A continuous autoregressive language model: backbone over patches and a generative head."""

    kind: Literal["calm"]
    patch_size: Positive = 4
    """Tokens per patch, K."""
    latent_size: Positive | None = None
    """Components of a latent, l; taken from the data store where absent."""
    autoencoder: str | None = None
    """Autoencoder checkpoint directory; taken from the data store where absent."""
    autoencoder_size: AutoencoderSize = AutoencoderSize()
    """Shape of that autoencoder, from which its FLOPs and memory are counted; the paper's where
    absent, replaced by the checkpoint's own (`Recipe.with_autoencoder`) once there is one."""
    latent_slots: Positive | None = None
    """Slots of that autoencoder's latents; taken from its checkpoint where absent."""
    head: Annotated[SerializeAsAny[HeadRecipe], BeforeValidator(_of_its_kind)] = HeadRecipe()
    """The generative head, see below."""

    @property
    def has_latents(self) -> bool:
        """Whether the head predicts latents; otherwise latent size and autoencoder have no use."""
        return self.head.spec.predicts == "latents"

    @property
    def head_spec(self) -> HeadSpec:
        """The description of the head, for patches of this size."""
        return self.head.spec.for_patches(self.patch_size)


class TransformerModel(BackboneModel):
    """The discrete baseline on the same backbone, with an untied output layer."""

    kind: Literal["transformer"]

    @property
    def patch_size(self) -> int:
        """One: every token is a step."""
        return 1


class AutoencoderModel(AutoencoderSize, Initialization):
    """The autoencoder that packs K tokens into one Gaussian latent."""

    kind: Literal["autoencoder"]
    vocab_size: Positive | None = None
    """Entries of the tokenizer; taken from the data store where absent."""
    patch_size: Positive = 4
    """Tokens per patch, K; divides the block."""
    latent_size: Positive = 128
    """Components of a latent, l; the paper has 32 for each token."""
    latent_slots: Positive = 1
    """1, or the patch size: the latent is cut into one slot for each token, and the decoder of a
    token sees its own slot and those before; for the chain head."""
    latent_dropout: Probability = 0.15
    """Probability with which a component of the sampled latent is dropped; the others are scaled
    up."""
    token_dropout: Probability = 0.15
    """Probability with which an input token is replaced by ``replaced_token_id``."""
    replaced_token_id: NonNegative | None = None
    """The tokenizer's padding token where absent."""
    kl_weight: NonNegativeFloat = 1e-3
    """Weight of the KL term beside K times the cross entropy."""
    kl_clamp: NonNegativeFloat = 0.5
    """Floor of the KL term of each dimension of each latent."""


LanguageModel = CalmModel | TransformerModel
Model = Annotated[LanguageModel | AutoencoderModel, Field(discriminator="kind")]


class DataSource(Section):
    """One store of a mixture."""

    path: Text
    """Directory or URL of the store."""
    weight: PositiveFloat = 1.0
    """Share of the blocks drawn from it, relative to the other weights."""


DataPath = Annotated[
    Annotated[Text, Tag("store")]
    | Annotated[
        tuple[DataSource, ...],
        # Strict tuples refuse the lists that YAML gives.
        Field(strict=False),
        Tag("mixture"),
    ],
    Discriminator(lambda value: "store" if isinstance(value, str) else "mixture"),
]


class Data(Section):
    """Where blocks of tokens and latents come from."""

    path: DataPath
    """A store, as ``tools/encode_latents.py`` makes it: a directory, ``s3://…`` or another URL that
    Streaming knows; or a list of ``{path, weight}``, from which blocks are drawn by weight."""
    tokenizer: str | None = None
    """Tokenizer file; the store's own copy where absent."""
    begin_token: Text | None = None
    """Name of the token that begins documents and fills prompts; the store's where absent."""
    end_token: Text | None = None
    """Name of the token that ends documents and generated texts; the store's where absent. One
    token may be both."""
    block_size: Positive | None = None
    """Tokens per block, a multiple of the patch size; taken from the data store where absent."""
    latents: Literal["stored", "on_the_fly"] = "stored"
    """``on_the_fly``: the frozen autoencoder encodes each batch, so that a store of tokens alone is
    enough."""
    seed: Seed = 0
    """Seed of the order in which blocks are read."""
    num_workers: NonNegative = 0
    """Reader processes per rank; 0 reads in the training process."""
    cache_dir: str | None = None
    """Where shards of remote stores are kept; a temporary directory where absent."""
    download_retries: NonNegative = 10
    """How often the download of a file from an object store is tried again after a fault that may
    pass: throttling, an error of the server, a connection that is cut. The pauses double from one
    second to 30."""
    download_timeout_seconds: Annotated[float, Field(gt=0, le=1e5)] = 60.0
    """How long S3 may send nothing before an attempt counts as failed; other clouds' clients have
    limits of their own."""
    download_limit_seconds: Annotated[float, Field(gt=0, le=1e6)] = 900.0
    """After this time no further attempt at a file begins: the run ends with exit code 6."""

    @property
    def patience_seconds(self) -> float:
        """How long a rank may be busy with downloads that fail, and others wait for it."""
        if not any("://" in source.path for source in self.sources):
            return 0.0
        return self.download_limit_seconds + self.download_timeout_seconds

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The stores with their weights, whichever way ``path`` was written."""
        return (DataSource(path=self.path),) if isinstance(self.path, str) else self.path


class Parallel(Section):
    """How the model is cut over processes."""

    tensor_parallel_size: Positive = 1
    """Processes that share every matrix of the backbone (TP); a power of two."""
    pipeline_parallel_size: Positive = 1
    """Stages of consecutive layers (PP); the head lives on the last."""
    virtual_pipeline_size: Annotated[int, Field(ge=2)] | None = None
    """Model chunks per pipeline stage for the interleaved schedule; plain 1F1B where absent."""
    stage_layers: Annotated[tuple[Positive, ...], Field(strict=False)] | None = None
    """Layers of each pipeline stage; where absent, so many that all stages have about as much work,
    the head's on the last one included."""
    sequence_parallel: bool = False
    """Share norms and dropout along the sequence over tensor-parallel ranks; no effect alone."""
    context_parallel_size: Positive = 1
    """Processes that share a block: each holds one piece of consecutive steps."""
    zero_stage: int = 2
    """ZeRO stage (1, 2, 3) of the head's engine, over all ranks of the last pipeline stage; 3 only
    without pipeline stages."""
    distributed_optimizer: bool = False
    """Shard the backbone's optimizer state over its data- and context-parallel replicas."""
    overlap_grad_reduce: bool = False
    """Reduce the backbone's gradients over its replicas while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights during the next forward pass; for ``distributed_optimizer``."""
    overlap_p2p: bool = False
    """Send between pipeline stages while they compute; for the interleaved schedule, on GPUs."""
    world_size: Positive | None = None
    """Processes planned for; the launch decides. Where absent: one model replica."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto``: GPUs where there are some. A node whose GPUs torch does not find ends the run."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one model replica: TP x PP x CP."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def chunks_per_stage(self) -> int:
        """Model chunks that each pipeline stage holds."""
        return self.virtual_pipeline_size or 1

    @property
    def use_sequence_parallel(self) -> bool:
        """Whether the sequence is really cut: asked for, and TP > 1."""
        return self.sequence_parallel and self.tensor_parallel_size > 1


class Training(Section):
    """Length, batch and optimizer of a run."""

    steps: Positive
    """Optimizer steps of the whole run, those before a restart included."""
    micro_batch_size: Positive
    """Blocks per forward pass and rank; what to lower first when memory is short."""
    global_batch_size: Positive
    """Blocks per optimizer step, over all ranks; a multiple of ``micro_batch_size`` times the
    replicas."""
    learning_rate: PositiveFloat = 3e-4
    """After the warm-up."""
    warmup_steps: NonNegative = 2000
    """Steps of linear warm-up; may exceed ``steps``."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """After warm-up: ``constant``; ``cosine`` and ``linear`` decay to zero at ``steps``; ``wsd``
    (warm-up, stable, decay) stays constant and decays over the last ``decay_steps``, so that a run
    can be made longer from any checkpoint before them."""
    decay_steps: Positive | None = None
    """Steps of the linear decay to zero at ``steps`` that ends ``wsd``; needed there, and nowhere
    else."""
    optimizer: Annotated[str, Field(examples=["adamw"])] = "adamw"
    """``adamw``, or one that an installed package registers. A run cannot change it."""
    weight_decay: NonNegativeFloat = 0.1
    """Not applied to biases and norms."""
    adam_beta1: Probability = 0.9
    """Decay of the first moment."""
    adam_beta2: Probability = 0.95
    """Decay of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    clip_grad_norm: PositiveFloat = 1.0
    """Limit of the joint gradient norm of backbone and head."""
    energy_kernel: Literal["auto", "torch", "triton"] = "auto"
    """What computes the energy score of a CALM's energy head. ``triton``: one fused kernel, for
    GPUs; ``auto``: ``triton`` on a GPU where it is installed, else ``torch``. The random streams
    differ; the distribution is the same."""

    @field_validator("optimizer")
    @classmethod
    def _is_registered(cls, kind: str) -> str:
        return known_kind(kind, all_optimizers(), OPTIMIZERS, "an optimizer")

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """The description of the optimizer."""
        return optimizer_spec(self.optimizer)


class Checkpoint(Section):
    """When checkpoints are written."""

    every: Positive = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep: Positive = 2
    """Newest checkpoints that stay on disk; besides, the newest one that a finite step followed."""
    keep_every: Positive | None = None
    """Checkpoints of steps that are multiples of this stay, too."""
    asynchronous: Annotated[bool, Field(alias="async")] = True
    """Write beside the training, which waits only while its state is copied. Autoencoders, which
    are small, are always written at once."""


class Logging(Section):
    """What is reported while training."""

    every: Positive = 10
    """Steps between records in metrics.jsonl and lines on the console; the last step always has
    one."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; ``offline`` writes into the run directory, for ``wandb sync``."""
    tensorboard: bool = False
    """Event files under ``logs/tensorboard`` of the run directory."""
    project: str = "calm_dist"
    """Project of wandb."""


class Health(Section):
    """When a run gives up."""

    timeout_seconds: Annotated[float, Field(gt=0, le=1e6)] = 600.0
    """Longest time that a rank may go without a sign of progress, such as a micro-batch, a batch
    that was read or a checkpoint that was written; half as long again and 30 s before the first
    step. Also how long ranks wait for each other to be launched."""
    max_skipped_steps: Positive = 50
    """Consecutive steps with a non-finite loss or gradient after which the run ends."""


class Evaluation(Section):
    """How held-out scores are taken."""

    data: str | None = None
    """Store on which autoencoder training measures reconstruction; where absent, the store
    ``valid`` beside the first of ``data.path``, if there is one."""
    blocks: Positive | None = None
    """Blocks that are scored; all of the store where absent."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Draws per position; the Brier score needs two."""
    alignment: Literal["patch", "all"] = "patch"
    """Where scored n-grams begin: at the beginnings of patches, or at every position."""
    seed: NonNegative = 0
    """Seed of the draws."""
