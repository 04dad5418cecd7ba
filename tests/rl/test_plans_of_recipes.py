"""The plans beside the papers' recipes are what `turnwise plan` prints of them, on models of those shapes."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from turnwise.command import read_config
from turnwise.precheck import show_plan
from turnwise.train import recipe_called

RECIPES = Path(__file__).parents[2] / "examples" / "openrlhf"
QWEN = {"num_hidden_layers": 28, "tie_word_embeddings": False}
# The models that a recipe has; what the command names for them where the recipe means a cold start's; their shape.
PLANNED: dict[str, tuple[str, str, PretrainedConfig]] = {
    "longshort_qwen_7b": (
        "long short",
        "Qwen/Qwen2.5-7B-Instruct",
        Qwen2Config(
            **QWEN, vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_attention_heads=28,
            num_key_value_heads=4, max_position_embeddings=32_768,
        ),
    ),
    "longshort_llama_8b": (
        "long short",
        "meta-llama/Llama-3.1-8B-Instruct",
        LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072,
        ),
    ),
    "thinkless_1.5b": (
        "model",
        "",
        Qwen2Config(
            **QWEN, vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
            num_key_value_heads=2, max_position_embeddings=131_072,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANNED)
def test_a_recipes_plan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models, named, config = PLANNED[name]
    config.save_pretrained(tmp_path)
    flags = [word for model in models.split() for word in (f"--{model}", str(tmp_path))]
    monkeypatch.setenv("COLUMNS", "110")
    recipe = recipe_called(name.split("_")[0])
    show_plan(
        read_config(recipe, ["--config", str(RECIPES / f"{name}.toml"), *flags, "--assumptions.gpu-hour-price", "2.5"])
    )
    command, _, printed = (RECIPES / f"{name}.plan.txt").read_text().partition("\n\n")
    named = "".join(f"--{model} {named} " for model in models.split() if named)
    recipe_and_file = f"{name.split('_')[0]} --config examples/openrlhf/{name}.toml"
    assert command == f"turnwise plan {recipe_and_file} {named}--assumptions.gpu-hour-price 2.5"
    assert capsys.readouterr().out == printed
