"""Shell. The settings of one gateway process: what each part gets of them, at the start and
whenever the config file changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from gateway.adapters.alias_store import AliasStore
from gateway.adapters.aliases import Alias, from_config
from gateway.adapters.pins import Pins
from gateway.adapters.reconciler import Reconciler
from gateway.api.body.bounds import Bounds
from gateway.api.services import GenerationServices, RequestLimits
from gateway.dispatch.queue.admission import Admission, QueueBound
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.settings import DispatchSettings
from gateway.dispatch.streams.journal import JournalBounds
from gateway.http.browser_policy import BrowserPolicy
from shared.config.llm import LoraConfig, Settings
from shared.config.reload import plan
from shared.config.settings_file import FollowedConfig
from shared.errors import ConfigError

log = logging.getLogger("loraplex.gateway")


# ---- what each part is told ----------------------------------------------------------------------


def most_requests(settings: Settings) -> dict[str, int]:
    """Base model -> the most requests that one of its workers gets at once."""
    return {m.model_id: m.deployment_config.max_ongoing_requests for m in settings.models}


def queue_bounds(settings: Settings) -> dict[str, QueueBound]:
    """Base model -> the bounds of its queue."""
    found = {}
    for model in settings.models:
        config = model.deployment_config
        pressure = config.backpressure_config
        found[model.model_id] = QueueBound(
            config.max_queued_requests, pressure.status_code == 429, pressure.retry_after_s
        )
    return found


def dispatch_settings(settings: Settings) -> DispatchSettings:
    g = settings.gateway
    journals = JournalBounds(g.resume_max_tokens, g.resume_max_bytes)
    return DispatchSettings(
        g.max_concurrent_requests, g.progress_s or 0.0, journals, g.http.max_open_body_bytes
    )


def request_limits(settings: Settings) -> RequestLimits:
    g = settings.gateway
    return RequestLimits(
        g.max_body_bytes,
        g.slow_reader_bytes,
        g.request_timeout_s,
        g.resume,
        Bounds(**msgspec.structs.asdict(g.bounds)),
        g.http.max_unfinished_body_bytes,
        g.keep_answers_s or 0.0,
        g.private_prefix_cache,
    )


def configured_aliases(settings: Settings) -> dict[str, dict[str, Alias]]:
    """Base model -> the aliases that the config defines."""
    return {
        m.model_id: {name: from_config(c) for name, c in m.lora_config.alias_configs.items()}
        for m in settings.models
        if m.lora_config is not None
    }


def configured_pins(settings: Settings) -> Mapping[str, Pins]:
    """Base model -> the adapters that the config pins or preloads."""
    pins = {}
    for model in settings.models:
        lora = model.lora_config or LoraConfig()
        pins[model.model_id] = Pins(model.model_id, lora.pin, lora.preload, model.max_loras)
    return pins


# ---- its change ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Configurable:
    """The parts that can take changed settings while they run. `limit_bodies` tells the routes how
    large a request may be.
    """

    services: GenerationServices
    admission: Admission[InFlightRequest]
    aliases: AliasStore
    reconciler: Reconciler
    browsers: BrowserPolicy
    limit_bodies: Callable[[RequestLimits], None]

    def take(self, settings: Settings) -> None:
        """Gives every part its share of the settings."""
        g, services = settings.gateway, self.services
        services.limits = request_limits(settings)
        services.access.set_level(g.log_level)
        services.dispatcher.configure(dispatch_settings(settings))
        services.dispatcher.fleet.configure(most_requests(settings))
        self.admission.configure(g.max_queued_requests, g.queue_timeout_s, queue_bounds(settings))
        self.aliases.configure(configured_aliases(settings))
        self.reconciler.configure(configured_pins(settings))
        self.browsers.configure(g)
        self.limit_bodies(services.limits)
        logging.getLogger("loraplex").setLevel(g.log_level.upper())


class LiveSettings:
    """`settings` are those in force. A config file with a mistake changes nothing."""

    def __init__(self, settings: Settings, config: FollowedConfig, parts: Configurable) -> None:
        self.settings = settings
        self._config, self._parts = config, parts

    def listens_at(self, port: int) -> None:
        """The real port is none that is to be changed, where the file said 0."""
        gateway = msgspec.structs.replace(self.settings.gateway, port=port)
        self.settings = msgspec.structs.replace(self.settings, gateway=gateway)

    def ask(self) -> None:
        """Has the file read now, without waiting for the next check."""
        self._config.ask()

    async def run(self) -> None:
        async for found in self._config.changes():
            if isinstance(found, ConfigError):
                self.refused(found.message)
            else:
                self._take(found)

    def refused(self, why: str) -> None:
        """Notes a mistake in the config file. The supervisor calls it too: it reads the file for
        all processes.
        """
        log.error("config not read again; the one before stays in force", extra={"why": why})
        self._parts.services.metrics.config_reload("refused")

    def _take(self, found: Settings) -> None:
        planned = plan(self.settings, found)
        self.settings = planned.settings
        if planned.changed:
            self._parts.take(planned.settings)
            self._parts.services.metrics.config_reload("done")
        log.info("config read again", extra={"changed": ", ".join(planned.changed) or "nothing"})
        if planned.need_restart:
            log.warning(
                "changes that take effect with the next start",
                extra={"keys": ", ".join(planned.need_restart)},
            )
