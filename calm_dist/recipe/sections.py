"""The sections of a recipe and their fields: types, ranges, defaults and meanings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
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
    """Name, directory and seed of a run."""

    dir: Text
    """The run directory; it holds recipe.yaml, metrics.jsonl, checkpoints/ and logs/."""
    name: str | None = None
    """Name shown by trackers and reports, one line; the name of the directory if absent."""
    seed: Seed = 0
    """Seed of weights, noise and posterior draws."""

    continue_from: Text | None = None
    """Run directory or checkpoint of another run; this run starts with its weights and optimizer
    state, for example to train on other data; see checkpoints.md. Ignored once ``dir`` has a
    checkpoint of its own."""

    init_from: Text | None = None
    """Run directory, checkpoint, or directory in the released layout; this run starts with its
    weights alone, and a head that does not fit is initialised; see checkpoints.md. Ignored once
    ``dir`` has a checkpoint of its own."""

    @property
    def display_name(self) -> str:
        """``name``, or the last part of ``dir``."""
        return self.name or Path(self.dir).name


def _of_its_kind(value: Any) -> Any:
    """Validate the fields of a head with the field type of its kind."""
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
    """An even number: half of the layers work on tokens, half on patches."""
    num_decoder_layers: Positive = 2
    """An even number: half of the layers work on patches, half on tokens."""


class Initialization(Section):
    """Initial weights of a model."""

    init: Literal["fan_in", "released"] = "fan_in"
    """``fan_in``: std 1/sqrt(fan in); ``released``: ``initializer_range`` everywhere."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the weights with ``init: released``."""


class BackboneModel(Initialization):
    """Shape of the Llama-like Transformer that both language models share."""

    vocab_size: Positive | None = None
    """Vocabulary size of the tokenizer; taken from the data store if absent."""
    hidden_size: Positive
    """Width of the hidden states; a multiple of twice the number of attention heads."""
    intermediate_size: Positive
    """Inner width of the SwiGLU."""
    num_hidden_layers: Positive
    """Transformer layers, over all pipeline stages."""
    num_attention_heads: Positive
    """Attention heads per layer; a multiple of the tensor-parallel size."""
    num_key_value_heads: Positive | None = None
    """Key and value heads per layer: fewer than attention heads for grouped-query attention; as
    many if absent."""
    qk_norm: bool = False
    """RMSNorm on the queries and keys of each head, as in OLMo 2 and Qwen 3; more stable at high
    learning rates. The authors' released layout cannot hold its weights."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding; each step (patch or token) is a position."""
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
    """A continuous autoregressive language model: a backbone over patches and a generative head."""

    kind: Literal["calm"]
    patch_size: Positive = 4
    """Tokens per patch, K."""
    latent_size: Positive | None = None
    """Components of a latent, l; taken from the data store if absent."""
    autoencoder: str | None = None
    """Autoencoder checkpoint directory; taken from the data store if absent."""
    autoencoder_size: AutoencoderSize = AutoencoderSize()
    """Shape of that autoencoder, for counting its FLOPs and memory; the paper's if absent, replaced
    by that of the checkpoint (`Recipe.with_autoencoder`) once there is one."""
    latent_slots: Positive | None = None
    """Slots of that autoencoder's latents; taken from its checkpoint if absent."""
    head: Annotated[SerializeAsAny[HeadRecipe], BeforeValidator(_of_its_kind)] = HeadRecipe()
    """The generative head, see below."""

    @property
    def has_latents(self) -> bool:
        """Whether the head predicts latents; otherwise latent size and autoencoder are unused."""
        return self.head.spec.predicts == "latents"

    @property
    def head_spec(self) -> HeadSpec:
        """The description of the head, for patches of this size."""
        return self.head.spec.for_patches(self.patch_size)


class TransformerModel(BackboneModel):
    """The discrete baseline: the same backbone with an untied output layer."""

    kind: Literal["transformer"]

    @property
    def patch_size(self) -> int:
        """One: every token is a step."""
        return 1


class AutoencoderModel(AutoencoderSize, Initialization):
    """The autoencoder that packs K tokens into one Gaussian latent."""

    kind: Literal["autoencoder"]
    vocab_size: Positive | None = None
    """Vocabulary size of the tokenizer; taken from the data store if absent."""
    patch_size: Positive = 4
    """Tokens per patch, K; divides the block size."""
    latent_size: Positive = 128
    """Components of a latent, l; the paper uses 32 per token."""
    latent_slots: Positive = 1
    """1, or the patch size. The latter cuts the latent into one slot per token, and the decoder of
    a token sees its own slot and those before it; for the chain head."""
    latent_dropout: Probability = 0.15
    """Probability that a component of the sampled latent is dropped; the others are scaled up."""
    token_dropout: Probability = 0.15
    """Probability that an input token is replaced by ``replaced_token_id``."""
    replaced_token_id: NonNegative | None = None
    """Token that ``token_dropout`` inserts; the tokenizer's padding token if absent."""
    kl_weight: NonNegativeFloat = 1e-3
    """Weight of the KL term, which is added to K times the cross entropy."""
    kl_clamp: NonNegativeFloat = 0.5
    """Floor of the KL term of each dimension of each latent."""


LanguageModel = CalmModel | TransformerModel
Model = Annotated[LanguageModel | AutoencoderModel, Field(discriminator="kind")]


class WeightFrom(Section):
    """The weight of a store from a step on."""

    step: NonNegative
    """First step of this weight, counted from 0."""
    weight: NonNegativeFloat
    """Share of the blocks drawn from the store, relative to the other weights; 0 for none."""


class DataSource(Section):
    """One store of a mixture."""

    path: Text
    """Directory or URL of the store."""
    weight: Annotated[
        Annotated[PositiveFloat, Tag("constant")]
        | Annotated[tuple[WeightFrom, ...], Field(strict=False, min_length=1), Tag("changing")],
        Discriminator(lambda value: "changing" if isinstance(value, list | tuple) else "constant"),
    ] = 1.0
    """Share of the blocks drawn from this store, relative to the other weights; or a list of
    ``{step, weight}``, for weights that change; before the first of these steps it is 0."""
    max_epochs: PositiveFloat | None = None
    """How often the store may be read; none of its blocks comes more often than this, rounded up.
    Then the other stores take its share; training does not start if they cannot."""

    def weight_at(self, step: int) -> float:
        """The weight in a step."""
        if isinstance(self.weight, float):
            return self.weight
        return next((one.weight for one in reversed(self.weight) if one.step <= step), 0.0)


def _kind_of_path(value: Any) -> str:
    if isinstance(value, str):
        return "store"
    if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
        return "stores"
    return "mixture"


DataPath = Annotated[
    Annotated[Text, Tag("store")]
    | Annotated[tuple[Text, ...], Field(strict=False), Tag("stores")]
    | Annotated[
        tuple[DataSource, ...],
        # Strict tuples refuse the lists that YAML gives.
        Field(strict=False),
        Tag("mixture"),
    ],
    Discriminator(_kind_of_path),
]


class Data(Section):
    """Source of the blocks of tokens and latents."""

    path: DataPath
    """A store made by ``tools/encode_latents.py``: a directory, ``s3://…`` or another URL that
    Streaming supports; a list of stores, each of which is read once per epoch; or a list of
    ``{path, weight}``, from which blocks are drawn by weight. A training that is resumed may have
    further stores at the end of its list; see data.md."""
    tokenizer: str | None = None
    """Tokenizer file; the store's own copy if absent."""
    begin_token: Text | None = None
    """Name of the token that begins documents and pads prompts; the store's if absent."""
    end_token: Text | None = None
    """Name of the token that ends documents and generated texts; the store's if absent. May be the
    same as ``begin_token``."""
    block_size: Positive | None = None
    """Tokens per block, a multiple of the patch size; taken from the data store if absent."""
    latents: Literal["stored", "on_the_fly"] = "stored"
    """``on_the_fly``: the frozen autoencoder encodes each batch, so the store needs only tokens."""
    seed: Seed = 0
    """Seed of the order in which blocks are read."""
    num_workers: NonNegative = 0
    """Reader processes per rank; 0 reads in the training process."""
    cache_dir: str | None = None
    """Directory for downloaded shards of remote stores; a temporary directory if absent."""
    cache_limit: Annotated[
        Annotated[ByteSize, Field(gt=0)] | None, Field(examples=["200GB", "1.5TB"])
    ] = None
    """Most disk space that these shards take on a node, as a number of bytes or with a unit; those
    read longest ago are deleted. If absent, every shard is kept."""
    download_retries: NonNegative = 10
    """Retries of a file's download from an object store after a transient fault: throttling, a
    server error, a broken connection. The pauses double from one second to 30."""
    download_timeout_seconds: Annotated[float, Field(gt=0, le=1e5)] = 60.0
    """Time without data from S3 after which an attempt counts as failed; the clients of other
    clouds have limits of their own."""
    download_limit_seconds: Annotated[float, Field(gt=0, le=1e6)] = 900.0
    """Time after which a file is not tried again; the run then ends with exit code 6."""

    @property
    def patience_seconds(self) -> float:
        """Longest time that failing downloads may keep a rank busy while other ranks wait."""
        if not any("://" in source.path for source in self.sources):
            return 0.0
        return self.download_limit_seconds + self.download_timeout_seconds

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The stores with their weights, for all forms of ``path``."""
        paths = (self.path,) if isinstance(self.path, str) else self.path
        return tuple(DataSource(path=p) if isinstance(p, str) else p for p in paths)

    @property
    def weights(self) -> list[float | list[tuple[int, float]]] | None:
        """The weights of the stores; None: in proportion to their sizes."""
        if isinstance(self.path, str) or any(isinstance(path, str) for path in self.path):
            return None
        return [
            source.weight
            if isinstance(source.weight, float)
            else [(change.step, change.weight) for change in source.weight]
            for source in self.sources
        ]


class Parallel(Section):
    """How the model is distributed over processes."""

    tensor_parallel_size: Positive = 1
    """Processes that share every matrix of the backbone (TP); a power of two."""
    pipeline_parallel_size: Positive = 1
    """Stages of consecutive layers (PP); the head is on the last."""
    virtual_pipeline_size: Annotated[int, Field(ge=2)] | None = None
    """Model chunks per pipeline stage for the interleaved schedule; plain 1F1B if absent."""
    stage_layers: Annotated[tuple[Positive, ...], Field(strict=False)] | None = None
    """Layers of each pipeline stage; if absent, chosen so that all stages have about the same work,
    counting the head on the last one."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over tensor-parallel ranks; no effect if TP is
    1."""
    context_parallel_size: Positive = 1
    """Processes that share a block (CP); each holds a contiguous piece of its steps."""
    zero_stage: int = 2
    """ZeRO stage (1, 2, 3) of the head's engine, over all ranks of the last pipeline stage; 3 only
    without pipeline stages."""
    distributed_optimizer: bool = False
    """Shard the backbone's optimizer state over its data- and context-parallel replicas."""
    overlap_grad_reduce: bool = False
    """Reduce the backbone's gradients over its replicas during the backward pass."""
    overlap_param_gather: bool = False
    """Gather updated weights during the next forward pass; for ``distributed_optimizer``."""
    overlap_p2p: bool = False
    """Send between pipeline stages while they compute; for the interleaved schedule, on GPUs."""
    world_size: Positive | None = None
    """Processes to plan for; one model replica if absent. A training uses the launched number."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto``: GPUs if there are any. A node whose GPUs torch does not find ends the run."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """``sdpa``: torch's own attention; ``flash``: the flash-attn package, for bf16 on GPUs;
    ``auto``: flash-attn where it is installed and faster by a rule (before Hopper; on Hopper for
    heads larger than 128, and with context parallelism), else ``sdpa``, always on Blackwell.
    environment.json says which."""
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
        """Whether the sequence is actually split: requested, and TP > 1."""
        return self.sequence_parallel and self.tensor_parallel_size > 1


class Training(Section):
    """Length, batch and optimizer of a run."""

    steps: Positive
    """Optimizer steps of the whole run, including those before a restart."""
    micro_batch_size: Positive
    """Blocks per forward pass and rank; lower this first if memory is short."""
    global_batch_size: Positive
    """Blocks per optimizer step, over all ranks; a multiple of ``micro_batch_size`` times the
    number of replicas."""
    learning_rate: PositiveFloat = 3e-4
    """Learning rate after the warm-up."""
    warmup_steps: NonNegative = 2000
    """Steps of linear warm-up; may exceed ``steps``."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """After warm-up: ``constant``; ``cosine`` and ``linear`` decay to zero at ``steps``; ``wsd``
    (warm-up, stable, decay) stays constant and decays over the last ``decay_steps``, so that a run
    can be extended from any checkpoint before the decay."""
    decay_steps: Positive | None = None
    """Steps of the final linear decay of ``wsd`` to zero at ``steps``; required with ``wsd``, not
    allowed otherwise."""
    optimizer: Annotated[str, Field(examples=["adamw"])] = "adamw"
    """``adamw``, or an optimizer that an installed package registers. Fixed for the life of a
    run."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay; not applied to biases and norms."""
    adam_beta1: Probability = 0.9
    """Decay rate of the first moment."""
    adam_beta2: Probability = 0.95
    """Decay rate of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    clip_grad_norm: PositiveFloat = 1.0
    """Limit of the joint gradient norm of backbone and head."""
    energy_kernel: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the energy score of a CALM's energy head. ``triton``: one fused kernel, for
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
    """When checkpoints are written and which are kept."""

    every: Positive = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep: Positive = 2
    """Number of newest checkpoints kept on disk, in addition to the newest one that a finite step
    followed."""
    keep_every: Positive | None = None
    """Also keep checkpoints of steps that are multiples of this."""
    asynchronous: Annotated[bool, Field(alias="async")] = True
    """Write in the background; training waits only while its state is copied. Checkpoints of
    autoencoders, which are small, are always written synchronously."""


class Logging(Section):
    """What is reported during training."""

    every: Positive = 10
    """Steps between records in metrics.jsonl and lines on the console; the last step always has
    one."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; ``offline`` writes into the run directory, for ``wandb sync``."""
    tensorboard: bool = False
    """Write event files under ``logs/tensorboard`` in the run directory."""
    project: str = "calm_dist"
    """Project in Weights & Biases."""


class Health(Section):
    """When a run gives up."""

    timeout_seconds: Annotated[float, Field(gt=0, le=1e6)] = 600.0
    """Longest time that a rank may go without a sign of progress, such as a micro-batch, a batch
    read or a checkpoint written; one and a half times this plus 30 s before the first step. Also
    how long ranks wait for each other at launch."""
    max_skipped_steps: Positive = 50
    """Consecutive steps with a non-finite loss or gradient after which the run ends."""


class Evaluation(Section):
    """How held-out scores are measured."""

    data: str | None = None
    """Store on which autoencoder training measures reconstruction; if absent, the store ``valid``
    next to the first of ``data.path``, if it exists."""
    blocks: Positive | None = None
    """Blocks to score; all blocks of the store if absent."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Draws per position; the Brier score needs at least two."""
    alignment: Literal["patch", "all"] = "patch"
    """Where scored n-grams begin: at the start of each patch, or at every position. Either way a
    CALM draws them from the start of a patch; with K > 4 only a patch's first four tokens count."""
    seed: NonNegative = 0
    """Seed of the draws."""
