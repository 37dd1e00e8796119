from dataclasses import dataclass, field

import pytest

from medclip_hf.training.arguments import RunArguments, build_section, build_sections, read_recipe


@dataclass(frozen=True)
class DataSection:
    folder: str
    crop_scale: tuple[float, float] | None = (0.5, 1.0)
    extra: dict[str, int] = field(default_factory=dict)


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_values_take_the_type_of_their_field(tmp_path):
    recipe = read_recipe(
        write(tmp_path, "training: {output_dir: runs, max_steps: 5, learning_rate: 5e-4, mixed_precision: no}")
    )
    run = build_section(RunArguments, recipe["training"], "training")
    assert (run.learning_rate, run.mixed_precision, run.max_steps) == (5e-4, "no", 5)


def test_an_override_wins_over_the_recipe(tmp_path):
    path = write(tmp_path, "training: {output_dir: runs, max_steps: 5}\ndata: {folder: a}")
    recipe = read_recipe(path, ["training.max_steps=20", "data.crop_scale=[0.9, 1]", "data.extra.depth=3"])
    sections = build_sections(recipe, {"training": RunArguments, "data": DataSection})
    assert sections["training"].max_steps == 20
    assert sections["data"] == DataSection("a", (0.9, 1.0), {"depth": 3})


def test_an_override_may_hold_an_equals_sign(tmp_path):
    recipe = read_recipe(write(tmp_path, "data: {folder: a}"), ["data.folder=b=c"])
    assert recipe["data"]["folder"] == "b=c"


def test_an_unknown_key_is_refused_with_the_closest_known_one():
    with pytest.raises(ValueError, match=r"unknown key 'training.learning_rte'. Did you mean 'learning_rate'\?"):
        build_section(RunArguments, {"output_dir": "runs", "max_steps": 1, "learning_rte": 1}, "training")


def test_an_unknown_section_is_refused():
    with pytest.raises(ValueError, match=r"unknown section 'trainng'. Did you mean 'training'\?"):
        build_sections({"trainng": {}}, {"training": RunArguments})


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match=r"'data.folder' is missing"):
        build_sections({}, {"data": DataSection})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("max_steps", "many", "'training.max_steps' must be a whole number, but is 'many'"),
        ("max_steps", 1.5, "must be a whole number"),
        ("max_steps", True, "must be a whole number"),
        ("learning_rate", "fast", "must be a number"),
        ("progress_bar", 1, "must be true or false"),
        ("lr_schedule", "linear", "must be one of 'cosine'"),
        ("trackers", "tensorboard", "must be a list"),
        ("batch_size_per_process", 0, "must be positive"),
        ("warmup_steps", -1, "must not be negative"),
        ("adam_beta2", 1.0, r"must lie in \[0, 1\)"),
        ("min_learning_rate", 1.0, "above learning_rate"),
        ("num_epochs", 3, "exactly one of max_steps and num_epochs"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(key, value, expected):
    with pytest.raises(ValueError, match=expected):
        build_section(RunArguments, {"output_dir": "runs", "max_steps": 1, key: value}, "training")


def test_a_tuple_of_fixed_length_keeps_its_length():
    with pytest.raises(ValueError, match="must hold 2 values"):
        build_section(DataSection, {"folder": "a", "crop_scale": [1.0]}, "data")


@pytest.mark.parametrize("override", ["max_steps=3", "training.max_steps", "training.=3", "=3"])
def test_an_override_that_names_no_key_is_refused(tmp_path, override):
    with pytest.raises(ValueError, match=r"reads section\.key=value"):
        read_recipe(write(tmp_path, "training: {}"), [override])


def test_an_override_through_a_value_is_refused(tmp_path):
    with pytest.raises(ValueError, match="goes through 'seed'"):
        read_recipe(write(tmp_path, "training: {seed: 3}"), ["training.seed.deeper=3"])


@pytest.mark.parametrize("text", ["training: [", "just text", "training: 3"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"recipe.yaml"):
        read_recipe(write(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe at .*nowhere\.yaml"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_the_last_micro_batch_may_be_smaller():
    run = RunArguments(output_dir="runs", max_steps=1, batch_size_per_process=10, micro_batch_size=4)
    assert run.num_micro_batches == 3
