"""What is kept of an answer, who gets it, who pays for it, and when it is dropped."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.link import messages
from shared.link.messages import END, SSE, STATUS_SHIFT, TOKENS, AnswerKey, Done, Generate, Refused
from worker.requests.kept_answers import MAX_UNHEARD, AnswerListener, KeptAnswer, KeptAnswers
from worker.settings import KeepBounds

KEY = AnswerKey(b"tag", b"digest")
BOUNDS = KeepBounds(10.0, 100, 1 << 20)
OK = 200 << STATUS_SHIFT | SSE


@dataclass
class Gateway:
    """What a gateway gets of one stream."""

    frames: list[messages.Frame] = field(default_factory=list)
    used: list[Done] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def frame(self, sid: int, flags: int, data: bytes, tokens: bytes = b"") -> None:
        self.frames.append((sid, flags, data, tokens))

    def done(self, done: Done) -> None:
        self.used.append(done)

    def refuse(self, refused: Refused) -> None:
        self.refused.append(refused)

    def whole(self) -> tuple[bytes, bytes, int]:
        """Bytes, tokens, and the flags of all frames together."""
        flags = 0
        for frame in self.frames:
            flags |= frame[1]
        return b"".join(f[2] for f in self.frames), b"".join(f[3] for f in self.frames), flags


def asked(key: AnswerKey | None = KEY, resume: bytes = b"") -> Generate:
    more = messages.Resume(resume) if resume else None
    return Generate(7, "/v1/x", "id", b"{}", created=5, key=key, resume=more)


def begun(kept: KeptAnswers, key: AnswerKey = KEY) -> tuple[KeptAnswer, Gateway]:
    gateway = Gateway()
    answer = kept.begin(1, asked(key), AnswerListener(gateway, gateway, 7))
    assert answer is not None
    return answer, gateway


FRAMES = [
    (OK, b"data: a\n\n", b"aaaa"),
    (0, b"data: b\n\n", b"bbbb"),
    (0, b"data: c\n\n", b"cccc"),
    (END, b"data: [DONE]\n\n", b""),
]


@given(st.integers(0, len(FRAMES)), st.booleans())
def test_who_joins_gets_the_same_bytes_and_tokens_whenever_it_comes(
    at: int, wordless: bool
) -> None:
    answer, first = begun(KeptAnswers(BOUNDS))
    late = Gateway()
    for n, (flags, data, tokens) in enumerate(FRAMES):
        if n == at:
            answer.join(AnswerListener(late, late, 9))
        answer.frame(7, flags, data, b"" if wordless and n == 2 else tokens)
    if at == len(FRAMES):
        answer.join(AnswerListener(late, late, 9))
    assert late.whole()[0] == first.whole()[0] and late.whole()[2] == first.whole()[2]
    assert {f[0] for f in late.frames} == {9}
    assert sum(bool(f[1] & END) for f in late.frames) == 1
    if not wordless:
        assert late.whole()[1] == first.whole()[1]
    elif at > 2:
        loose = [f for f in late.frames[1:] if not f[1] & END and not f[3]]
        assert loose or late.frames[-1][1] & END, "a part without tokens shows itself as such"


def test_an_answer_that_is_sent_whole_is_sent_whole_again() -> None:
    answer, first = begun(KeptAnswers(BOUNDS))
    late = Gateway()
    answer.frame(7, TOKENS, b"", b"aaaabbbb")
    answer.join(AnswerListener(late, late, 9))
    answer.frame(7, 200 << STATUS_SHIFT | END, b"{}", b"cccc")
    assert late.whole() == first.whole()
    again = Gateway()
    answer.join(AnswerListener(again, again, 10))
    assert again.whole() == first.whole()


def test_tokens_are_charged_once_whoever_listens() -> None:
    answer, first = begun(KeptAnswers(BOUNDS))
    second, third = Gateway(), Gateway()
    answer.frame(7, *FRAMES[0])
    answer.join(AnswerListener(second, second, 9))
    answer.done(Done(7, 10, 3))  # the first leaves
    answer.leave(first, 7, 0.0)
    answer.frame(7, *FRAMES[3])
    answer.done(Done(7, 10, 8))
    answer.join(AnswerListener(third, third, 11))
    charged = [(d.prompt_tokens, d.output_tokens) for g in (first, second, third) for d in g.used]
    assert sum(p for p, _ in charged) == 10 and sum(o for _, o in charged) == 8
    assert [d.sid for d in third.used] == [11]


def test_an_answer_that_nobody_hears_goes_on_for_its_time_and_no_longer() -> None:
    kept = KeptAnswers(BOUNDS)
    answer, first = begun(kept)
    answer.leave(first, 7, 100.0)
    answer.frame(7, *FRAMES[0])
    assert kept.expire(110.0) == [] and kept.get(KEY.tag) is answer
    late = Gateway()
    answer.join(AnswerListener(late, late, 9))
    assert kept.expire(1000.0) == [], "somebody hears it again"
    answer.leave(late, 9, 1000.0)
    assert kept.expire(1011.0) == [answer] and kept.get(KEY.tag) is None


def test_what_has_ended_is_kept_for_its_time_and_what_broke_off_is_not() -> None:
    kept = KeptAnswers(BOUNDS)
    answer, _ = begun(kept)
    answer.frame(7, *FRAMES[3])
    kept.over(answer, 50.0)
    kept.expire(60.0)
    assert kept.get(KEY.tag) is answer
    assert kept.expire(60.1) == [] and kept.get(KEY.tag) is None
    broken, _ = begun(kept)
    kept.over(broken, 0.0)
    assert len(kept) == 0


@pytest.mark.parametrize("bounds", [KeepBounds(10.0, 2, 1 << 20), KeepBounds(10.0, 100, 25)])
def test_beyond_its_bounds_the_oldest_that_have_ended_are_dropped_first(bounds: KeepBounds) -> None:
    kept = KeptAnswers(bounds)
    answers = []
    for n in range(4):
        answer, _ = begun(kept, AnswerKey(b"%d" % n, b"d"))
        answer.frame(7, OK, b"0123456789")
        answers.append(answer)
    for n in (1, 2):
        answers[n].frame(7, END, b"")
        kept.over(answers[n], 0.0)
    assert kept.expire(0.0) == []
    assert [n for n in range(4) if kept.get(b"%d" % n) is not None] == [0, 3]


def test_no_more_answers_than_the_bound_are_generated_unheard() -> None:
    kept = KeptAnswers(BOUNDS)
    for n in range(MAX_UNHEARD + 3):
        answer, gateway = begun(kept, AnswerKey(b"%d" % n, b"d"))
        answer.leave(gateway, 7, float(n) / 100)
    assert len(kept.expire(1.0)) == 3 and kept.get(b"0") is None and kept.get(b"3") is not None


def test_nothing_is_kept_without_a_key_or_of_an_answer_that_began_elsewhere_or_if_it_is_off() -> (
    None
):
    kept, off = KeptAnswers(BOUNDS), KeptAnswers(KeepBounds(0.0, 9, 9))
    listener = AnswerListener(None, Gateway(), 7)
    assert kept.begin(1, asked(None), listener) is None
    assert kept.begin(1, asked(resume=b"aaaa"), listener) is None
    assert off.begin(1, asked(), listener) is None


def test_an_answer_that_began_elsewhere_is_kept_once_its_begin_was_rendered_here() -> None:
    kept, gateway, late = KeptAnswers(BOUNDS), Gateway(), Gateway()
    answer = kept.go_on(1, asked(resume=b"aaaabbbb"), AnswerListener(gateway, gateway, 7))
    assert answer is not None
    early = Gateway()
    answer.join(AnswerListener(early, early, 8))
    for _, data, _ in FRAMES[:2]:
        answer.seen(data)
    assert not early.frames
    answer.frame(7, OK, FRAMES[2][1], FRAMES[2][2])
    answer.seen(b"data: lag\n\n")  # of another choice
    answer.frame(7, *FRAMES[3])
    answer.join(AnswerListener(late, late, 9))
    due = b"".join([*(f[1] for f in FRAMES[:3]), b"data: lag\n\n", FRAMES[3][1]])
    assert late.whole()[:2] == early.whole()[:2] == (due, b"aaaabbbbcccc")
    assert gateway.whole()[0] == FRAMES[2][1] + FRAMES[3][1]


def test_a_stream_whose_begin_was_rendered_elsewhere_alone_is_not_kept() -> None:
    kept, gateway = KeptAnswers(BOUNDS), Gateway()
    answer = kept.go_on(1, asked(resume=b"aaaa"), AnswerListener(gateway, gateway, 7))
    assert answer is not None
    early = Gateway()
    answer.join(AnswerListener(early, early, 8))
    answer.frame(7, OK, *FRAMES[1][1:])
    assert not kept.holds(answer) and len(gateway.frames) == 1
    assert [refused.sid for refused in early.refused] == [8]


def test_a_refusal_reaches_all_who_listen_under_their_own_ids() -> None:
    kept = KeptAnswers(BOUNDS)
    answer, first = begun(kept)
    late = Gateway()
    answer.join(AnswerListener(late, late, 9))
    refused = Refused(7, "engine_error", "x", True)
    answer.refuse(refused)
    assert kept.get(KEY.tag) is None, "who joins now would wait for ever"
    assert first.refused == [refused]
    assert late.refused == [msgspec.structs.replace(refused, sid=9)]
