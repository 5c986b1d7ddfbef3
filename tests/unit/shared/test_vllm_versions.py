"""Which versions of vLLM are known."""

from __future__ import annotations

import pytest

from shared.vllm_versions import cannot_import, is_tried, warning


@pytest.mark.parametrize(
    ("version", "tried"),
    [
        ("0.32.0", True),
        ("0.33.0+cpu", True),
        ("0.33.1.dev4+g123", True),
        ("0.34.0", False),
        ("0.3.2", False),
        ("dev", False),
    ],
)
def test_patch_releases_of_a_tried_version_are_known_and_no_other_version(
    version: str, tried: bool
) -> None:
    assert is_tried(version) is tried
    assert version in warning(version)


def test_what_another_version_lacks_is_told_with_the_versions_that_work() -> None:
    told = cannot_import("0.34.0", "No module named 'vllm.x'")
    assert "vLLM 0.34.0 was never tried" in told and "vllm.x" in told
    assert "install vLLM 0.32 or 0.33" in told
    for version in (None, "0.32.0"):
        assert "install loraplex[gpu] or loraplex[cpu]" in cannot_import(version, "no")
