"""Recipes: what is read, what is refused and how the refusal is worded."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from calm_dist.errors import RecipeError
from calm_dist.recipe import AutoencoderModel, CalmModel, Recipe, load_recipe
from calm_dist.recipe.overrides import apply_overrides

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL_RECIPES = Path(__file__).parents[1] / "recipes"
TINY = SMALL_RECIPES / "calm_4_layers.yaml"


def refusal(*overrides: str, recipe: Path = TINY) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, overrides)
    return str(error.value)


def store_meta(**changes: object) -> dict[str, object]:
    meta = {
        "variant": "fp16",
        "block_size": 512,
        "patch_size": 4,
        "latent_size": 32,
        "vocab_size": 512,
        "tokenizer": {"sha256": "0" * 64, "file": "tokenizer.json", "pad_id": 2},
        "autoencoder": {"sha256": "1" * 64, "file": "/ae"},
    }
    return meta | changes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("size", ["s", "m", "l", "xl"])
def test_paper_recipes_have_the_papers_batch(size: str) -> None:
    names = [f"calm_{size}", f"transformer_{size}"]
    paths = [path for name in names if (path := RECIPES / f"{name}.yaml").exists()]
    assert paths
    for path in paths:
        recipe = load_recipe(path)
        assert recipe.tokens_per_step == 2**21
        assert recipe.num_patches == 2048
        assert (recipe.training.steps, recipe.training.warmup_steps) == (250_000, 2000)
        assert recipe.training.learning_rate == 3e-4


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 32])
def test_calm_m_fits_other_world_sizes(world_size: int) -> None:
    recipe = load_recipe(RECIPES / "calm_m.yaml").with_world_size(world_size)
    assert recipe.data_parallel_size == world_size
    assert recipe.num_micro_batches * world_size * recipe.training.micro_batch_size == 256


def test_decay_may_fill_what_the_warm_up_leaves() -> None:
    fields = {"schedule": "wsd", "steps": 90, "warmup_steps": 50, "decay_steps": 40}
    overrides = [f"training.{name}={value}" for name, value in fields.items()]
    assert load_recipe(TINY, overrides).training.decay_steps == 40


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden_sizes=64", "did you mean model.hidden_size?"),
        ("training.block_size=64", "did you mean data.block_size?"),
        ("trainig.steps=3", "did you mean training?"),
        ("model.head.gamma=1", "num_samples"),
        ("model.num_encoder_layers=2", "unknown key for model.kind calm"),
        ("parallel.tensor_parallel_size=3", "model.num_attention_heads 4"),
        ("parallel.tensor_parallel_size=0", "greater than 0"),
        ("parallel.pipeline_parallel_size=5", "model.num_hidden_layers is 4"),
        ("parallel={context_parallel_size: 2, world_size: 3}", "parallel.world_size: 3 processes"),
        ("parallel.overlap_param_gather=true", "parallel.distributed_optimizer=true"),
        ("parallel.overlap_p2p=true", "only the interleaved schedule"),
        ("parallel={overlap_p2p: true, virtual_pipeline_size: 2, device: cpu}", "gloo gave"),
        ("parallel.virtual_pipeline_size=4", "use fewer stages or chunks"),
        ("parallel.world_size=6", "replicas of 4"),
        ("training.schedule=wsd", "training.decay_steps: absent, but training.schedule is wsd"),
        ("training={schedule: wsd, decay_steps: 0}", "greater than 0"),
        (
            "training={schedule: wsd, steps: 90, warmup_steps: 50, decay_steps: 41, "
            "micro_batch_size: 2, global_batch_size: 8}",
            "41 plus training.warmup_steps 50 is more than training.steps 90",
        ),
        ("training.decay_steps=5", "training.schedule is constant, and only wsd"),
        ("training.schedule=wsdd", "'wsd'"),
        ("parallel.zero_stage=0", "zero_stage: 0"),
        ("parallel.zero_stage=3", "zero_stage: 3 with pipeline_parallel_size 2"),
        ("training.global_batch_size=7", "use 8"),
        ("training.steps=many", "found 'many'"),
        ("training.steps=1.5", "found 1.5"),
        ("training.steps=0100", "training.steps"),
        ("training.steps=1:30", "found '1:30'"),
        ("training.steps=!!int abc", "cannot be parsed"),
        ("training.steps=true", "found True"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("model.patch_size=0", "model.patch_size: found 0"),
        ("model.patch_size=3", "use 513"),
        ("data.block_size=4", "use at least 8"),
        ("model.head.width=64", "model.head.width: 64, but the energy head is as wide as"),
        ("model.num_attention_heads=3", "model.hidden_size: 128"),
        ("model.head.beta=2.5", "beta: found 2.5"),
        ("model.head.beta=2", "beta: found 2"),
        ("model.head.num_samples=1", "num_samples: found 1"),
        ("training.energy_kernel=cuda", "found 'cuda'"),
        (f"training.steps=1{'0' * 400}", "training.steps"),
        ("run.name=a\nb", "run.name: 'a\\nb' has a line break"),
        ("run.name=a\u202eb", "give one line of text"),
        ("model.kind=clam", "use calm or transformer or autoencoder"),
        ("data.path=[]", "data.path: an empty list"),
        ("data.path=[a, {path: b}]", "data.path.0: found 'a'"),
        ("data.path=[{path: a, weight: 0}]", "data.path.0.weight: found 0"),
        ("data={path: 3}", "data.path: found 3"),
        ("data.cache_limit=1e9", "data.cache_limit: found 1000000000.0; give a number of bytes"),
        ("training=4", "training: found 4"),
        ("training.steps.more=4", "steps has no fields"),
        ("steps", "section.field=value"),
        ("health=[", "correct the YAML"),
        ("run.dir=", "run.dir: found ''; string should have at least 1 character"),
        ("run={dir: null}", "run.dir: found None"),
        ('run={dir: "a\\0b"}', "run.dir: 'a\\x00b' has a null character"),
        ("run={dir: [&a x, *a]}", "alias *a: write the value itself"),
        # As the system gives a name that is not UTF-8.
        ("run.name=caf\udce9", "run.name: 'caf\\udce9' has a line break or another character"),
    ],
)
def test_refusals_name_field_value_and_remedy(override: str, words: str) -> None:
    message = refusal(override)
    assert words in message
    assert override.partition("=")[0].split(".")[0] in message


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("calm", "model.head.width=64"),
        ("autoencoder", "parallel.recompute=true"),
        ("autoencoder", "parallel.stage_layers=[2]"),
    ],
)
def test_what_a_run_ignored_is_left_out_of_its_recipe_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, field: str
) -> None:
    name = field.partition("=")[0]
    own = RECIPES / f"{kind}_tiny.yaml"
    values = apply_overrides(load_recipe(own).to_dict(), [field], Recipe)
    for file in ("recipe.yaml", "mine.yaml"):
        (tmp_path / file).write_text(yaml.safe_dump(values))
    for _ in range(2):
        assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(own)
    assert len(caplog.messages) == 1 and name in caplog.messages[0]
    for file, overrides in (("mine.yaml", []), ("recipe.yaml", [field])):
        assert name in refusal(*overrides, recipe=tmp_path / file)


def test_all_problems_come_at_once() -> None:
    message = refusal("model.patch_size=3", "parallel.world_size=6", "parallel.zero_stage=0")
    assert message.count("\n  - ") == 3


def test_refusals_that_need_several_fields() -> None:
    assert "use 2" in refusal("parallel.zero_stage=1", "precision=bf16")
    assert "nothing to interleave" in refusal(
        "parallel.pipeline_parallel_size=1", "parallel.virtual_pipeline_size=2"
    )
    assert "found 1" in refusal("parallel.virtual_pipeline_size=2", "training.micro_batch_size=16")
    assert "model.autoencoder" in refusal("data.latents=on_the_fly", "model.autoencoder=null")
    # Heads and intermediate size would allow 3; the padded vocabulary does not.
    assert "power of two" in refusal(
        "parallel.tensor_parallel_size=3",
        "model.num_attention_heads=3",
        "model.hidden_size=132",
        "model.intermediate_size=384",
    )


def test_an_energy_kernel_needs_an_energy_score() -> None:
    kernel = "training.energy_kernel=triton"
    assert load_recipe(RECIPES / "calm_m.yaml", [kernel]).training.energy_kernel == "triton"
    for name, overrides in (("calm_m", ["model.head.kind=flow"]), ("transformer_m", [])):
        with pytest.raises(RecipeError, match="only a CALM with the energy head"):
            load_recipe(RECIPES / f"{name}.yaml", [kernel, *overrides])


def test_autoencoder_refusals() -> None:
    path = RECIPES / "autoencoder_tiny.yaml"
    assert "use 4" in refusal("model.num_encoder_layers=3", recipe=path)
    assert "data parallelism" in refusal("parallel.tensor_parallel_size=2", recipe=path)
    assert "outside the vocabulary" in refusal("model.replaced_token_id=4096", recipe=path)


def test_missing_section_and_field() -> None:
    values = yaml.safe_load(TINY.read_text())
    del values["run"], values["model"]["hidden_size"]
    with pytest.raises(RecipeError, match=r"run: missing(.|\n)*model.hidden_size: missing"):
        Recipe.from_dict(values)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: 1\na: 2", "line 2: key 'a' appears twice"), ("- 1", "not a mapping"), ("a: [", "YAML")],
)
def test_malformed_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refusal(recipe=path)
    assert words in message and str(path) in message


def test_absent_file() -> None:
    assert "absent.yaml: No such file" in refusal(recipe=Path("absent.yaml"))


def test_yaml_as_people_write_it() -> None:
    recipe = load_recipe(
        TINY, ["training.learning_rate=3e-4", "logging.wandb=off", "training.weight_decay=1"]
    )
    assert recipe.training.learning_rate == 3e-4
    assert recipe.logging.wandb == "off"
    assert recipe.training.weight_decay == 1.0


def test_later_overrides_win_and_new_sections_appear() -> None:
    recipe = load_recipe(TINY, ["training.steps=5", "training.steps=6", "health.timeout_seconds=9"])
    assert recipe.training.steps == 6
    assert recipe.health.timeout_seconds == 9.0


def test_mixture_of_stores() -> None:
    recipe = load_recipe(TINY, ["data.path=[{path: a}, {path: s3://b, weight: 2}]"])
    assert [(s.path, s.weight) for s in recipe.data.sources] == [("a", 1.0), ("s3://b", 2.0)]
    assert recipe.data.weights == [1.0, 2.0]
    assert load_recipe(TINY).data.sources[0].path == "runs/quickstart/latents/train"
    plain = load_recipe(TINY, ["data.path=[a, s3://b]"])
    assert [s.path for s in plain.data.sources] == ["a", "s3://b"] and plain.data.weights is None
    text = "data.path=[{path: a, weight: [{step: 5, weight: 2}], max_epochs: 4}, {path: b}]"
    changing = load_recipe(TINY, [text]).data
    assert changing.weights == [[(5, 2.0)], 1.0]
    assert [source.weight_at(4) for source in changing.sources] == [0.0, 1.0]
    assert [source.max_epochs for source in changing.sources] == [4.0, None]
    again = load_recipe(TINY, [text]).to_dict()["data"]["path"]
    assert again[0] == {"path": "a", "weight": [{"step": 5, "weight": 2.0}], "max_epochs": 4.0}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("[{path: a, weight: [{step: 5, weight: 1}]}]", "all weights are 0 from step 0 on"),
        (
            "[{path: a, weight: [{step: 5, weight: 1}, {step: 2, weight: 1}]}]",
            r"data.path\[0\].weight: its steps are \[5, 2\]; give each once",
        ),
        ("[{path: a, weight: []}]", r"data.path.0.weight: found \[\]"),
        ("[{path: a, weight: -1}]", "data.path.0.weight: found -1"),
        ("[{path: a, max_epochs: 0}]", "data.path.0.max_epochs: found 0"),
        ("[a, {path: b}]", "data.path.0: found 'a'"),
    ],
)
def test_mixtures_that_cannot_be(path: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(TINY, [f"data.path={path}"])


def test_a_block_of_one_token_leaves_nothing_to_predict() -> None:
    with pytest.raises(RecipeError, match=r"data.block_size: 1 is a single token.*use at least 2"):
        load_recipe(SMALL_RECIPES / "transformer_4_layers.yaml", ["data.block_size=1"])


def test_layout_numbers() -> None:
    recipe = load_recipe(TINY, ["parallel.world_size=8"])
    assert recipe.parallel.model_parallel_size == 4
    assert (recipe.data_parallel_size, recipe.num_micro_batches) == (2, 1)
    assert recipe.num_patches == 128
    assert load_recipe(TINY, ["data.block_size=516"]).padded_length == 130
    alone = load_recipe(TINY, ["parallel.tensor_parallel_size=1"])
    assert alone.parallel.sequence_parallel and not alone.parallel.use_sequence_parallel


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(TINY).training.steps = 3


def test_launched_world_that_does_not_fit() -> None:
    with pytest.raises(RecipeError, match=r"parallel.world_size: 6"):
        load_recipe(TINY).with_world_size(6)


def test_store_fills_what_is_absent() -> None:
    names = ("model.vocab_size", "model.latent_size", "model.autoencoder", "data.block_size")
    open_recipe = load_recipe(TINY, [f"{name}=null" for name in names])
    with pytest.raises(RecipeError, match=r"data.block_size: absent"):
        _ = open_recipe.num_patches
    recipe = open_recipe.with_store(store_meta())
    assert isinstance(recipe.model, CalmModel)
    assert (recipe.model.vocab_size, recipe.model.latent_size) == (512, 32)
    assert recipe.model.autoencoder == "/ae"
    assert recipe.num_patches == 128
    assert recipe.data.tokenizer == "runs/quickstart/latents/train/tokenizer.json"


@pytest.mark.parametrize(
    ("field", "stored"),
    [("block_size", 1024), ("patch_size", 2), ("latent_size", 64), ("vocab_size", 4096)],
)
def test_store_that_contradicts_the_recipe(field: str, stored: int) -> None:
    recipe = load_recipe(TINY)
    wanted = getattr(recipe.data if field == "block_size" else recipe.model, field)
    with pytest.raises(RecipeError, match=f"{field}: {wanted} in the recipe, {stored} in the data"):
        recipe.with_store(store_meta(**{field: stored}))


def test_transformer_reads_any_patch_size() -> None:
    recipe = load_recipe(SMALL_RECIPES / "transformer_4_layers.yaml")
    filled = recipe.with_store(store_meta(patch_size=8, latent_size=None, variant="tokens"))
    assert filled.num_patches == 512


def test_store_without_latents() -> None:
    with pytest.raises(RecipeError, match="only tokens"):
        load_recipe(TINY).with_store(store_meta(variant="tokens", latent_size=None))


def test_tokenizer_that_does_not_fit_the_store(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    recipe = load_recipe(TINY, [f"data.tokenizer={file}"])
    with pytest.raises(RecipeError, match=r"data.tokenizer: .* has sha256 44136fa355b3"):
        recipe.with_store(store_meta())
    sha256 = hashlib.sha256(b"{}").hexdigest()
    fitting = store_meta(tokenizer={"sha256": sha256, "file": "tokenizer.json", "pad_id": 2})
    assert recipe.with_store(fitting).data.tokenizer == str(file)


def test_replaced_token_is_the_stores_padding() -> None:
    recipe = load_recipe(RECIPES / "autoencoder_tiny.yaml", ["model.vocab_size=512"])
    model = recipe.with_store(store_meta()).model
    assert isinstance(model, AutoencoderModel) and model.replaced_token_id == 2
    without = store_meta(tokenizer={"sha256": "0", "file": "t", "pad_id": None})
    with pytest.raises(RecipeError, match="no padding token"):
        recipe.with_store(without)


def test_autoencoder_checkpoint_gives_its_shape() -> None:
    config = {
        "patch_size": 4,
        "latent_size": 32,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_encoder_layers": 4,
        "num_decoder_layers": 2,
        "ae_dropout": 0.15,
    }
    model = load_recipe(TINY).with_autoencoder(config).model
    assert isinstance(model, CalmModel) and model.autoencoder_size is not None
    assert model.autoencoder_size.num_encoder_layers == 4
    with pytest.raises(RecipeError, match=r"model.latent_size: 32 in the recipe, 16"):
        load_recipe(TINY).with_autoencoder(config | {"latent_size": 16})
    with pytest.raises(RecipeError, match="has no autoencoder"):
        load_recipe(SMALL_RECIPES / "transformer_4_layers.yaml").with_autoencoder(config)


def test_no_torch_is_imported() -> None:
    modules = "recipe", "flops", "planner.dry_run", "reports.comparison_paper"
    imports = "; ".join(f"import calm_dist.{module}" for module in modules)
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("field", ["recompute=true", "stage_layers=[1,1]", "overlap_p2p=true"])
def test_what_an_autoencoder_would_ignore_is_refused(field: str) -> None:
    path = RECIPES / "autoencoder_tiny.yaml"
    with pytest.raises(RecipeError, match=f"parallel.{field.partition('=')[0]}: .*leave it out"):
        load_recipe(path, [f"parallel.{field}"])


def test_a_misspelt_key_of_a_list_is_suggested() -> None:
    found = refusal("data.path=[{path: a, wieght: 3}]")
    assert found.endswith("data.path.0.wieght: unknown key; did you mean data.path.0.weight?")
