"""The Transformer backbone on Megatron-core, shared by CALM and the discrete baseline.

Llama-like: RMSNorm, SwiGLU, rotary positions over steps, no biases, no dropout. A *step* is a
patch for CALM and a token for the baseline.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from calm_dist.compat.megatron import use_rotation, use_swiglu
from calm_dist.costs.stages import chunk_sizes
from calm_dist.models.attention import CachedSelfAttention, CoreAttention, RMSNorm
from calm_dist.models.kv_cache import SLOT_MULTIPLE, KeyValueCache
from calm_dist.models.patch_embedding import PatchEmbedding, TokenEmbedding
from calm_dist.models.patch_tokens import PatchTokens
from calm_dist.recipe import LanguageModelRecipe


def transformer_config(recipe: LanguageModelRecipe, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of the backbone that a recipe describes."""
    model, parallel = recipe.model, recipe.parallel
    on_cpu = not torch.cuda.is_available()
    has_kernels = _use_kernels()
    recompute = (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        if parallel.recompute
        else {}
    )
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.key_value_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        # This field alone makes Megatron sum the gradients of these norms over the tensor-parallel
        # ranks, which hold different heads.
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_size,
        pipeline_model_parallel_layout=_pipeline_layout(recipe),
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_parallel_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        # `models.initialize` sets every weight again, but this also tags weights as
        # tensor-parallel.
        perform_initialization=True,
        # These are CUDA or Transformer Engine kernels, but for the last two, which are ours.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=has_kernels,
        apply_rope_fusion=has_kernels,
        # Batched and overlapped p2p gave a silently wrong loss on gloo. NCCL needs batching unless
        # it overlaps.
        batch_p2p_comm=not on_cpu and not parallel.overlap_p2p,
        # A synchronisation of the device after every message, against an old fault of PyTorch.
        batch_p2p_sync=False,
        overlap_p2p_comm=parallel.overlap_p2p,
        **recompute,
    )


def _use_kernels() -> bool:
    """Whether rotary positions and SwiGLU are launches of our kernels: on GPUs with Triton."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    from calm_dist.models.rotary_kernel import rotate
    from calm_dist.models.swiglu_kernel import swiglu

    use_rotation(rotate)
    use_swiglu(swiglu)
    return True


def _pipeline_layout(recipe: LanguageModelRecipe) -> list[list[str]] | None:
    """Megatron's form of `stages.chunk_sizes`: the parts of the first chunk of every stage, then of
    the second chunk of every stage, ..."""
    sizes = chunk_sizes(recipe)
    if len(sizes) == 1:
        return None
    chunks = zip(*sizes, strict=True)
    layout = [["decoder"] * size for stages in chunks for size in stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def layer_spec(qk_norm: bool, attention: str) -> ModuleSpec:
    """One Llama-like layer made of Megatron's parts.

    Args:
        attention: ``sdpa`` or ``flash``, see `attention_kernel`.
    """
    head_norm = RMSNorm if qk_norm else IdentityOp
    core_attention = ModuleSpec(module=CoreAttention, params={"kernel": attention})
    self_attention = ModuleSpec(
        module=CachedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=self_attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class Backbone(MegatronModule):
    """One pipeline stage (or virtual chunk) of the backbone.

    ``first`` stages embed tokens; ``last`` stages end in the final norm. `forward` returns hidden
    states [steps, B, d], this rank's part of the steps under sequence parallelism.

    Attributes:
        patch_tokens: vocabulary tables of a head that predicts tokens, on the last stage.
    """

    def __init__(
        self,
        recipe: LanguageModelRecipe,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        first: bool = True,
        last: bool = True,
        vp_stage: int | None = None,
        attention: str = "sdpa",
    ) -> None:
        super().__init__(config)
        model = recipe.model
        # Megatron's schedules, DDP and checkpoints read these four names.
        self.pre_process, self.post_process, self.vp_stage = first, last, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.embedding: MegatronModule | None = None
        if first:
            assert model.vocab_size is not None
            if model.kind == "calm":
                self.embedding = PatchEmbedding(config, model.vocab_size, model.patch_size, groups)
            else:
                self.embedding = TokenEmbedding(config, model.vocab_size, groups)
        self.rotary = RotaryEmbedding(
            config.kv_channels,
            rotary_percent=1.0,
            rotary_base=model.rope_theta,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=groups.cp,
        )
        self.patch_tokens: PatchTokens | None = None
        if last and model.kind == "calm" and not model.has_latents:
            assert model.vocab_size is not None
            self.patch_tokens = PatchTokens(
                config, model.vocab_size, groups, independent=model.head.independent
            )
        # With a bare layer spec the block would use Megatron's own wrapper for the final norm,
        # which refuses sequence parallelism.
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=groups.pp.rank())
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules([layer_spec(model.qk_norm, attention)] * layers, RMSNorm),
            pre_process=first,
            post_process=last,
            pg_collection=groups,
            vp_stage=vp_stage,
        )

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by Megatron's schedules with the previous stage's output."""
        if isinstance(input_tensor, list):
            input_tensor = input_tensor[0]
        self.decoder.set_input_tensor(input_tensor)

    def forward(
        self,
        tokens: torch.Tensor,
        num_steps: int,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Run this stage.

        Args:
            tokens: [B, num_steps * K] (CALM) or [B, num_steps]; read by the first stage only.
            num_steps: length of the sequence in steps; under context parallelism, the length of
                this rank's piece.
            positions: rotary position of each step [num_steps]; default 0, 1, 2, ...
            mask: [num_steps, held + num_steps], True where a step may attend to a step in the cache
                or to one of the new ones; default causal.
            cache: the preceding steps, to which the new ones are appended; by default each row
                continues at its own length. For inference, without pipeline stages. B may exceed
                the cache's rows; the surplus only pads the batch.

        Raises:
            ValueError: the steps do not fit in the cache.
        """
        if cache is None:
            # packed_seq keeps Megatron from cutting the positions: its context-parallel ranks hold
            # other steps than ours.
            rotary = self.rotary(
                num_steps if positions is None else int(positions.max()) + 1, packed_seq=True
            )
            if positions is not None:
                rotary = rotary[positions.to(rotary.device, non_blocking=True)]
        else:
            following = cache.begin(num_steps)
            mask = cache.seen if mask is None else mask
            if positions is None:
                positions = F.pad(following, (0, tokens.shape[0] - cache.num_rows))
            else:
                positions = positions[:, None].expand(-1, tokens.shape[0])
            rotary = self.rotary(cache.max_sequence_length, packed_seq=True)
            rotary = rotary[positions.to(rotary.device)].flatten(2, 3)
        # Megatron computes the angles on the current GPU, where the model need not be.
        rotary = rotary.to(tokens.device)
        hidden = self.embedding(tokens) if self.embedding is not None else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=mask,
            rotary_pos_emb=rotary,
            inference_context=cache,
        )
        if cache is not None:
            cache.advance()
        return hidden

    def new_cache(self, rows: int, steps: int, *, together: bool = False) -> KeyValueCache:
        """An empty cache for the whole backbone: ``rows`` texts of at most ``steps`` steps each,
        which attend ``together`` or each on its own."""
        slots = -(-steps // SLOT_MULTIPLE) * SLOT_MULTIPLE
        memory = {}
        for layer in self.decoder.layers:
            attention = layer.self_attention
            shape = (rows, slots, attention.num_query_groups_per_partition)
            weight = attention.linear_qkv.weight
            # Slots that a mask hides are multiplied by zero, and must not hold NaN.
            made = weight.new_zeros if together else weight.new_empty
            memory[attention.layer_number] = (
                made(*shape, attention.key_hidden_size),
                made(*shape, attention.val_hidden_size),
            )
        return KeyValueCache(memory, torch.zeros(rows, dtype=torch.long), together=together)
