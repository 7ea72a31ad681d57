"""The exported model in mlx-lm; skipped where that is not installed (docs/engines.md says how to run it)."""

import re
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.generate import BatchGenerator, generate_step  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from tests.tools.small_model import LAYERS, SHAPE, VOCABULARY  # noqa: E402
from tools.engines.models.mlx_skv import Model, ModelArgs  # noqa: E402

LENGTH, NEW = 24, 6
MAPS = {
    "a quarter trails": [0, 1, 2, 3, 4, 5, 5, 5],
    "half trails": [0, 1, 2, 3, 3, 3, 2, 1],
    "one owner": [0] * LAYERS,
    "none trails": [0, 0, 2, 2, 4, 4, 6, 7],
}
PRODUCTS_OF_A_SHARER = 7  # q and o, gate, up and down, scores and their use
PRODUCTS_OF_AN_OWNER = 9  # k and v too


def model(sources: list[int], **fields: Any) -> Model:
    mx.random.seed(3)
    made = Model(
        ModelArgs(
            model_type="skv",
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            kv_source_layers=sources,
            **SHAPE,
            **fields,
        )
    )
    mx.eval(made.parameters())
    return made


def tokens() -> Any:
    return mx.random.randint(0, VOCABULARY, (LENGTH,), key=mx.random.key(5))


def log_probs(logits: Any) -> Any:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def products(state: Any, file: Path) -> int:
    """Matrix products that it takes to compute ``state``, counted in MLX's graph."""
    mx.export_to_dot(str(file), *(leaf for _, leaf in tree_flatten(state) if isinstance(leaf, mx.array)))
    return len(re.findall(r'label ?= ?"Matmul"', file.read_text()))


@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
def test_a_prompt_takes_the_layers_up_to_the_last_owner(sources: list[int], tmp_path: Path) -> None:
    """mlx-lm evaluates the cache behind each chunk of a prompt. MLX computes what that depends on: of the last owner
    its K/V, and of the layers behind it nothing."""
    of = model(sources)
    cache = make_prompt_cache(of)
    logits = of(tokens()[None], cache=cache)
    sharers_before = sum(source != layer for layer, source in enumerate(sources[: max(sources)]))
    owners_before = max(sources) - sharers_before
    needed = owners_before * PRODUCTS_OF_AN_OWNER + sharers_before * PRODUCTS_OF_A_SHARER + 2
    assert products([entry.state for entry in cache], tmp_path / "graph") == needed
    assert products(logits, tmp_path / "graph") > needed + PRODUCTS_OF_A_SHARER * (LAYERS - max(sources) - 1)


@pytest.mark.parametrize("step", [5, 2048])
@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
def test_a_prompt_in_chunks(sources: list[int], step: int) -> None:
    of = model(sources)
    ids = tokens()
    whole = log_probs(of(ids[None]))
    found = [logs for _, logs in generate_step(ids[: LENGTH - NEW], of, max_tokens=1, prefill_step_size=step)]
    assert mx.abs(found[0] - whole[0, LENGTH - NEW - 1]).max() < 1e-5


@pytest.mark.parametrize("step", [4, 2048])
@pytest.mark.parametrize("sources", MAPS.values(), ids=MAPS)
def test_prompts_of_a_batch_do_not_see_each_other(sources: list[int], step: int) -> None:
    of = model(sources)
    prompts = [[5, 6, 7], [3, 9, 8, 1, 2, 4, 4, 11, 4, 12, 33], [7]]
    alone = [[token for token, _ in generate_step(mx.array(ids), of, max_tokens=NEW)] for ids in prompts]
    batch = BatchGenerator(of, prefill_step_size=step)
    said: dict[int, list[int]] = {number: [] for number in batch.insert(prompts, [NEW] * len(prompts))}
    while any(len(tokens) < NEW for tokens in said.values()):
        _, answers = batch.next()
        for answer in answers:
            said[answer.uid].append(answer.token)
    assert list(said.values()) == alone


def test_an_adaptive_folder_takes_the_layers_of_its_map(tmp_path: Path) -> None:
    of = model(list(range(LAYERS)), kv_order=[0, 1, 3, 2, 7, 6, 5, 4], kv_retention=0.375)
    assert of.args.kv_source_layers == [0, 1, 1, 3, 3, 3, 3, 3]
    cache = make_prompt_cache(of)
    of(tokens()[None], cache=cache)
    needed = 2 * PRODUCTS_OF_AN_OWNER + PRODUCTS_OF_A_SHARER + 2
    assert products([entry.state for entry in cache], tmp_path / "graph") == needed
