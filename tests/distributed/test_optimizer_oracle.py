"""The joint optimizer against plain PyTorch: autograd, `clip_grad_norm_` and AdamW.

Layouts agree with each other even where all are wrong in the same way (weight decay on norms, a
head that is left out of the norm), so two of them are held against an unwrapped model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import language_recipe, recipe, run_jobs, training_records
from test_layouts import ALONE, PP2, SP, TOLERANCE, TP2, layout

STEPS = 12
# A limit that clips every step, a large decay and rate: mistakes in either would show.
SETTINGS: dict[str, object] = {
    "training__steps": STEPS,
    "training__weight_decay": 0.5,
    "training__learning_rate": 1e-2,
    "training__clip_grad_norm": 0.3,
    "training__schedule": "cosine",
}


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]
) -> list[tuple[float, float]]:
    return plain_training(tiny(tmp_path_factory.mktemp("plain"), "calm", **SETTINGS, **ALONE))


def plain_training(overrides: list[str]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a loop without Megatron's DDP and DeepSpeed."""
    from calm_dist.data.stream import open_training_stream
    from calm_dist.inference.load import single_process_recipe, single_process_topology
    from calm_dist.losses.energy import energy_score_reference
    from calm_dist.models.backbone import transformer_config
    from calm_dist.models.heads import latent_head
    from calm_dist.parallel.launch import World
    from calm_dist.parallel.noise import KeyedNoise
    from calm_dist.training.build import build_backbone, build_head
    from calm_dist.training.resolve import resolve

    given = resolve(language_recipe(recipe("calm"), overrides))
    model = given.model
    assert model.kind == "calm"
    topology = single_process_topology(single_process_recipe(given), torch.device("cpu"))
    backbone = build_backbone(given, transformer_config(given, torch.float32), topology, None)
    head = latent_head(build_head(model, given.run.seed))
    parameters = [*backbone.parameters(), *head.parameters()]
    training = given.training
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
    )
    # The schedule in torch's own words.
    warm_up = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1 / training.warmup_steps, 1.0, training.warmup_steps - 1
    )
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, training.steps - training.warmup_steps
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warm_up, decay], [training.warmup_steps]
    )
    World(0, 1, 0, 1, "", 0, "test").export()
    stream = open_training_stream(
        [source.path for source in given.data.sources], batch_size=training.global_batch_size
    )
    patches = given.num_patches
    history = []
    for step, batch in zip(range(STEPS), stream, strict=False):
        hidden = backbone(batch["tokens"], patches).transpose(0, 1)  # [B, P, d]
        noise = KeyedNoise(
            given.run.seed, step, batch["index"].tolist(), 0, patches, torch.device("cpu")
        )
        draws = noise.whole(
            "posterior",
            # Position by position, as `models.heads.base.normal_noise` draws.
            lambda generator, positions: torch.randn(
                positions, model.head.posterior_samples, 16, generator=generator
            ).transpose(0, 1),
        )
        head_noise = noise.whole(
            "head",
            lambda generator, positions: head.draw_noise(
                generator, model.head.num_samples, positions
            ),
        )
        # Patch i + 1 is predicted from position i; the last position predicts nothing.
        keep = (torch.arange(patches) < patches - 1).repeat(len(hidden))
        mean, log_std = (
            torch.roll(batch[name], -1, dims=1).flatten(0, 1)[keep] for name in ("mean", "log_std")
        )
        samples = head.sample(hidden.flatten(0, 1)[keep], head_noise[:, keep])
        loss = -energy_score_reference(samples, mean, log_std, draws[:, keep]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, training.clip_grad_norm)
        optimizer.step()
        schedule.step()
        history.append((float(loss.detach()), float(norm)))
    return history


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        pytest.param(4, layout(**TP2, **PP2, **SP, zero_stage=2), id="tp2pp2sp"),
        pytest.param(1, ALONE, id="alone", marks=pytest.mark.full),
    ],
)
def test_trainer_equals_plain_pytorch(
    ranks: int,
    settings: dict[str, object],
    plain: list[tuple[float, float]],
    tmp_path: Path,
    tiny: Callable[..., list[str]],
) -> None:
    overrides = tiny(tmp_path / "run", "calm", **{**SETTINGS, **settings})
    run_jobs(ranks, [("calm", overrides)], tmp_path)
    ours = training_records(tmp_path / "run")
    assert len(ours) == len(plain) == STEPS
    assert all(norm > 0.3 for _, norm in plain), "the limit must clip every step"
    for step, (loss, norm) in enumerate(plain, start=1):
        assert abs(ours[step]["loss"] - loss) <= TOLERANCE * max(1, abs(loss)), step
        assert abs(ours[step]["grad_norm"] - norm) <= TOLERANCE * max(1, norm), step
