"""Shell. Applies all that keeps the tenants of one engine apart."""

from __future__ import annotations

from collections.abc import Collection

from vllm.v1.engine.async_llm import AsyncLLM

from worker.engine.vllm.tenants.cache_salt import keep_apart
from worker.engine.vllm.tenants.media_addresses import fetch_from_public_addresses
from worker.engine.vllm.tenants.media_names import drop_media_names
from worker.engine.vllm.tenants.own_requests import abort_own_only
from worker.engine.vllm.tenants.picture_memory import bound_pictures
from worker.engine.vllm.tenants.pooled_media import bound_pooled_media
from worker.engine.vllm.tenants.sound_memory import bound_sounds
from worker.engine.vllm.tenants.video_memory import bound_videos


def install(engine: AsyncLLM, allowed_media_domains: Collection[str] | None) -> None:
    """Called once for each engine, before its first request. `allowed_media_domains`: those of
    vLLM's option; none: any public address. Raises AttributeError if vLLM has changed.
    """
    keep_apart(engine)
    abort_own_only(engine)
    drop_media_names()
    bound_pictures()
    bound_sounds()
    bound_videos()
    bound_pooled_media()
    fetch_from_public_addresses(allowed_media_domains)
