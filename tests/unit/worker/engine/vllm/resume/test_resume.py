"""Which answers are continued and which are made again, and what a client gets of either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from shared.errors import CannotContinue
from shared.link.token_ids import pack, pack_choice, unpack
from worker.engine.vllm.resume.answer_progress import Progress
from worker.engine.vllm.resume.modes import OF_THE_TEXT_ALONE, ResumeMode, mode_of, seed_of


@dataclass
class Part:
    index: int
    token_ids: Sequence[int]


def test_what_depends_on_the_text_alone_is_continued() -> None:
    assert mode_of(OF_THE_TEXT_ALONE, 1, reasons=False) is ResumeMode.CONTINUE


@pytest.mark.parametrize(
    "field", ["seed", "n", "logprobs", "frequency_penalty", "bad_words", "a field to come"]
)
def test_whatever_is_not_known_to_depend_on_the_text_alone_is_made_again(field: str) -> None:
    assert mode_of({"temperature", field}, 1, reasons=False) is ResumeMode.REGENERATE


def test_several_prompts_and_grammars_behind_reasoning_are_made_again() -> None:
    assert mode_of(set(), 2, reasons=False) is ResumeMode.REGENERATE
    assert mode_of({"structured_outputs"}, 1, reasons=True) is ResumeMode.REGENERATE
    assert mode_of({"structured_outputs"}, 1, reasons=False) is ResumeMode.CONTINUE
    assert mode_of({"temperature"}, 1, reasons=True) is ResumeMode.CONTINUE


def test_every_attempt_of_a_request_has_the_same_seed_and_others_have_others() -> None:
    assert seed_of("chatcmpl-1") == seed_of("chatcmpl-1") != seed_of("chatcmpl-2")


def test_tokens_leave_with_the_bytes_that_were_rendered_from_them() -> None:
    progress = Progress()
    left: list[bytes] = []

    def complete() -> None:
        left.append(progress.words)
        progress.words = b""

    progress.on_complete = complete
    progress.enter_prompt()
    for token in (1, 2, 3):
        progress.take(0, [Part(0, [token])])
    progress.rendered()
    assert left == [pack([1]), pack([2])], "the last ones leave with the end"
    assert progress.words == pack([3])


def test_what_the_client_has_is_old_and_its_tokens_are_not_told_again() -> None:
    progress = Progress(pack([1, 2]))
    progress.enter_prompt()
    ages = []
    for token in (1, 2, 3):
        progress.take(0, [Part(0, [token])])
        ages.append(progress.old)
    assert ages == [True, True, False] and progress.words == pack([3])


def test_each_choice_has_a_cut_of_its_own() -> None:
    progress = Progress(pack_choice(0, [1]) + pack_choice(1, [7, 8]))
    progress.enter_prompt()
    progress.choices = 2
    ages = []
    for part in (Part(1, [7]), Part(0, [1]), Part(0, [2]), Part(1, [8]), Part(1, [9])):
        progress.take(0, [part])
        ages.append(progress.old)
    assert ages == [True, True, False, True, False]
    assert unpack(progress.words) == {0: [2], 1: [9]}


@pytest.mark.parametrize("made", [[[1], [3]], [[1, 2, 3]]])
def test_an_answer_that_contradicts_what_the_client_has_is_given_up(made: list[list[int]]) -> None:
    progress = Progress(pack([1, 2]))
    progress.enter_prompt()
    with pytest.raises(CannotContinue):
        for ids in made:
            progress.take(0, [Part(0, ids)])
    assert isinstance(progress.failure, CannotContinue)
