"""The requests that warm an engine up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.vllm.boot.warm_up_requests import MOST_PROMPTS, prefills


def test_an_8b_model_warms_up_the_sizes_between_its_graphs_and_its_largest_batch() -> None:
    assert [[len(p) for p in prompts] for prompts in prefills(512, 8192, 2046)] == [
        [1024],
        [2046, 2],
        [2046, 2046, 4],
        [2046, 2046, 2046, 2046, 8],
    ]


@given(st.integers(1, 1024), st.integers(1, 1 << 15), st.integers(1, 4096))
def test_every_prefill_has_its_size_and_no_prompt_is_too_long_or_found_in_the_prefix_cache(
    above: int, most: int, longest: int
) -> None:
    made = prefills(above, most, longest)
    sizes = [sum(map(len, prompts)) for prompts in made]
    assert sizes == [above << n for n in range(1, len(sizes) + 1)] and all(
        size <= most for size in sizes
    )
    prompts = [prompt for one in made for prompt in one]
    assert all(len(one) <= MOST_PROMPTS for one in made) and all(
        0 < len(prompt) <= longest for prompt in prompts
    )
    assert len({prompt[0] for prompt in prompts}) == len(prompts)


def test_a_batch_that_graphs_cover_needs_no_prefill() -> None:
    assert prefills(512, 512, 2046) == []
