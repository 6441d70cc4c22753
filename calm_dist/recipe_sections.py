"""The sections of a recipe and their fields: types, ranges, defaults and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all parts of a recipe: immutable, no unknown keys, no silent type conversions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Run(Section):
    """What the run is called and where it is kept."""

    dir: Text
    """The run directory itself; it holds recipe.yaml, metrics.jsonl, checkpoints/ and logs/."""
    name: str | None = None
    """Name shown by trackers and reports, one line; the directory's own name where absent."""
    seed: Seed = 0
    """Seed of weights, noise and posterior draws."""

    @property
    def display_name(self) -> str:
        """``name``, or the last part of ``dir``."""
        return self.name or Path(self.dir).name


class HeadRecipe(Section):
    """The generative head: one step with the energy score, or the iterative alternatives.

    One type for all kinds, so that ``model.head.kind=flow`` alone changes the head of a recipe.
    """

    kind: Literal["energy", "diffusion", "flow"] = "energy"
    """``energy`` is the paper's own; what each costs is in heads.md."""
    num_mlp_layers: Positive = 4
    """Residual blocks."""
    noise_size: Positive = 64
    """Energy: components of the uniform noise. The other heads start from normal latents."""
    num_samples: Positive = 8
    """Energy: head samples N per position in training, at least two for the score's second term.
    Diffusion and flow: noisy latents per position in training."""
    posterior_samples: Positive = 100
    """Energy: draws M from the autoencoder's posterior per position."""
    beta: Annotated[float, Field(gt=0, lt=2)] = 1.0
    """Energy: exponent of the score; strictly proper inside (0, 2)."""
    sampling_steps: Positive | None = None
    """Steps that draw one sample. Flow: midpoint steps of two evaluations each, 10 where absent.
    Diffusion: 100 where absent, at most 1,000. The energy head has one step."""

    @property
    def steps_per_sample(self) -> int:
        """``sampling_steps``, or the released code's number."""
        return self.sampling_steps or {"energy": 1, "flow": 10, "diffusion": 100}[self.kind]

    @property
    def evaluations_per_sample(self) -> int:
        """How often the network runs to draw one sample."""
        return self.steps_per_sample * (2 if self.kind == "flow" else 1)


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


class BackboneRecipe(Initialization):
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
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding; a position is a step: a patch, or a token."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""

    @property
    def key_value_heads(self) -> int:
        """``num_key_value_heads``, or as many as attention heads."""
        return self.num_key_value_heads or self.num_attention_heads


class CalmRecipe(BackboneRecipe):
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
    head: HeadRecipe = HeadRecipe()
    """The generative head, see below."""


class TransformerRecipe(BackboneRecipe):
    """The discrete baseline on the same backbone, with an untied output layer."""

    kind: Literal["transformer"]

    @property
    def patch_size(self) -> int:
        """One: every token is a step."""
        return 1


class AutoencoderRecipe(AutoencoderSize, Initialization):
    """The autoencoder that packs K tokens into one Gaussian latent."""

    kind: Literal["autoencoder"]
    vocab_size: Positive | None = None
    """Entries of the tokenizer; taken from the data store where absent."""
    patch_size: Positive = 4
    """Tokens per patch, K; divides the block."""
    latent_size: Positive = 128
    """Components of a latent, l; the paper has 32 for each token."""
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


Model = Annotated[CalmRecipe | TransformerRecipe | AutoencoderRecipe, Field(discriminator="kind")]


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
    """Length, batch and optimizer (AdamW) of a run."""

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
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up: constant, or a decay to zero at ``steps``."""
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
    energy_kernel: Literal["torch", "triton"] = "torch"
    """What computes the energy score of a CALM's energy head. ``triton``: one fused kernel, for
    GPUs; not timed yet. Their draws differ, of one distribution."""


class Checkpoint(Section):
    """When checkpoints are written."""

    every: Positive = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep: Positive = 2
    """Newest checkpoints that stay on disk."""
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
