"""Pure. The small sections of an LLMConfig: which model, which adapters, on which hardware. Names
and defaults are Ray Serve LLM's (2.60).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from shared.adapters.identity import name_problem
from shared.config.aliases import AliasConfig, alias_findings, plain_alias
from shared.config.section import Finding, Section, shown, under

Positive = Annotated[int, Meta(ge=1)]
Text = Annotated[str, Meta(min_length=1)]
Seconds = Annotated[float, Meta(gt=0)]
SecondsOrNone = Annotated[float, Meta(ge=0)]

DEFAULT_MAX_LORAS = 16  # Ray's default of max_num_adapters_per_replica
_MODEL_ID_CHARS = 200  # ids are in every request, log line and metric label
BUCKETS = ("s3://", "gs://")
_AZURE = re.compile(
    r"(?:abfss|azure)://[a-z0-9$-]+@[a-z0-9]+\.(?:dfs|blob)\.core\.[a-z.]+(?:/|\Z)"
    r"|https://[a-z0-9]+\.(?:dfs|blob)\.core\.[a-z.]+/[a-z0-9$-]+(?:/|\Z)"
)
_HUB = re.compile(r"hf://[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*(?:@[\w./-]+)?)?/?\Z", re.ASCII)
_NO_STORE = ("abfss://", "azure://", "az://", "hdfs://")


class ModelLoadingConfig(Section, frozen=True, kw_only=True):
    """Which model to serve, under which name. `model_source` is a Hugging Face id, a local folder,
    or a bucket. Without it, `model_id` is the Hugging Face id.
    """

    model_id: Text
    model_source: str | dict[str, Any] | None = None
    tokenizer_source: Text | None = None

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        source = given.get("model_source")
        if (
            isinstance(source, Mapping)
            and {*source} - {"extra_files"} == {"bucket_uri"}
            and not source.get("extra_files")  # Ray's default
            and isinstance(source["bucket_uri"], str)
        ):
            given["model_source"] = source["bucket_uri"]
        for key in ("model_source", "tokenizer_source"):
            if isinstance(given.get(key), str) and given[key]:
                given[key] = _plain(given[key])
        return given

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        if "model_id" in values:
            yield from _model_id_rules(values["model_id"])
        source = values.get("model_source")
        if isinstance(source, dict) and "bucket_uri" in source and len(source) > 1:
            for key in sorted({*map(str, source)} - {"bucket_uri"}):
                yield Finding(
                    ("model_source", key),
                    "is not supported; the folder of bucket_uri is brought as it is",
                )
        elif isinstance(source, dict):
            yield Finding(
                ("model_source",),
                "expected a Hugging Face id, a local folder, s3://..., gs://... or bucket_uri: "
                f"with one of these, got the keys {', '.join(sorted(map(str, source)))[:200]}",
            )
        elif isinstance(source, str) and source.startswith(_NO_STORE):
            yield Finding(
                ("model_source",),
                f"{shown(source)} is in a cloud that is not supported; s3:// and gs:// are, or "
                "download it first and give the local folder",
            )
        elif isinstance(source, str):
            yield from _source_rules("model_source", source, BUCKETS)
        yield from _source_rules("tokenizer_source", values.get("tokenizer_source") or "x", ())


def _source_rules(key: str, source: str, clouds: tuple[str, ...]) -> Iterator[Finding]:
    """Of a source that is text. `clouds` are the beginnings of addresses from which it is
    brought.
    """
    scheme, separator, rest = source.partition("://")
    if not source:
        yield Finding(
            (key,),
            "is empty; give a Hugging Face id or a local folder, or leave it out to use model_id",
        )
    elif separator and scheme + separator not in clouds:
        forms = ", ".join(("a Hugging Face id", "a local folder", *(f"{c}..." for c in clouds)))
        yield Finding((key,), f"expected one of {forms}, got {shown(source)}")
    elif separator and not rest.partition("/")[0]:
        yield Finding((key,), f"{shown(source)} names no bucket; write {scheme}://bucket/folder")


def _model_id_rules(model_id: str) -> Iterator[Finding]:
    path = ("model_id",)
    if ":" in model_id:
        yield Finding(
            path,
            f"{shown(model_id)} contains ':', which separates a base model from its "
            "adapter in requests; choose another name",
        )
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in model_id):
        yield Finding(
            path,
            f"{shown(model_id)} contains control characters, which clients, logs and "
            "metrics cannot carry; remove them",
        )
    elif model_id != model_id.strip():
        yield Finding(path, f"{shown(model_id)} begins or ends with a blank; remove it")
    if len(model_id) > _MODEL_ID_CHARS:
        yield Finding(path, f"is longer than {_MODEL_ID_CHARS} characters; choose a shorter name")


class StoreConfig(Section, frozen=True, kw_only=True):
    """How to reach the adapter store. This section is ours, not Ray's. Credentials come from the
    environment or the named profile, never from here.
    """

    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "access_key_id",
            "secret_access_key",
            "aws_access_key_id",
            "aws_secret_access_key",
            "session_token",
            "credentials",
        ),
        "credentials do not belong in this file; use the environment, a profile, or "
        "the role of the machine",
    )

    endpoint_url: Text | None = None
    region: Text | None = None
    profile: Text | None = None
    anonymous: bool = False
    addressing_style: Literal["auto", "virtual", "path"] | None = None

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        url = values.get("endpoint_url")
        if isinstance(url, str) and not url.startswith(("http://", "https://")):
            yield Finding(
                ("endpoint_url",), f"expected http://host:port or https://host, got {shown(url)}"
            )
        elif isinstance(url, str) and "@" in url:
            yield Finding(
                ("endpoint_url",),
                "credentials do not belong in this file; use the environment or a profile",
            )


class LoraConfig(Section, frozen=True, kw_only=True):
    """Where the adapters are, and how many a worker holds at once.

    If `max_num_adapters_per_replica` is not set, it is `engine_kwargs.max_loras`, or 16;
    `LLMConfig.max_loras` is the number that holds. `download_timeout_s` None means no limit. Each
    adapter has a folder of its own directly under `dynamic_lora_loading_path`.

    Ours, not Ray's: every worker loads the adapters of `preload` and of `pin` as soon as it serves.
    Those of `pin` keep their slots.
    """

    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras"), "belongs in engine_kwargs"
    )

    dynamic_lora_loading_path: Text | None = None
    max_num_adapters_per_replica: Positive | None = None
    download_timeout_s: float | None = 30.0
    max_download_tries: Positive = 3
    store: StoreConfig = msgspec.field(default_factory=StoreConfig)
    preload: tuple[Text, ...] = ()
    pin: tuple[Text, ...] = ()
    aliases: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def alias_configs(self) -> dict[str, AliasConfig]:
        return {
            name: raw if isinstance(raw, AliasConfig) else msgspec.convert(raw, AliasConfig)
            for name, raw in self.aliases.items()
        }

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        if isinstance(given.get("aliases"), Mapping):
            given["aliases"] = {name: plain_alias(raw) for name, raw in given["aliases"].items()}
        timeout_s = given.get("download_timeout_s")
        if (
            isinstance(timeout_s, int | float)
            and not isinstance(timeout_s, bool)
            and timeout_s <= 0
        ):
            given["download_timeout_s"] = None  # as in Ray
        path = given.get("dynamic_lora_loading_path")
        if isinstance(path, str) and path:
            given["dynamic_lora_loading_path"] = path = _plain(path)
            store = given.get("store")
            # Ray's way to ask for unsigned requests
            if path.startswith("s3://anonymous@") and isinstance(
                store, StoreConfig | Mapping | None
            ):
                given["dynamic_lora_loading_path"] = "s3://" + path.removeprefix("s3://anonymous@")
                given["store"] = _anonymous(store)
        return given

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        aliases = values.get("aliases")
        if aliases:
            yield from under(("aliases",), alias_findings(aliases))
        path = values.get("dynamic_lora_loading_path")
        for key in ("preload", "pin"):
            names = values.get(key) or ()
            yield from _name_rules(key, names)
            if names and "dynamic_lora_loading_path" in values and path is None:
                yield Finding(
                    (key,),
                    "names adapters, but dynamic_lora_loading_path does not say where "
                    "they are; set it",
                )
        if aliases and "dynamic_lora_loading_path" in values and path is None:
            yield Finding(
                ("aliases",),
                "aliases stand for adapters, but dynamic_lora_loading_path does not "
                "say where they are; set it",
            )
        if not isinstance(path, str):
            return
        here = ("dynamic_lora_loading_path",)
        scheme, separator, rest = path.partition("://")
        if scheme in ("abfss", "azure", "https") and separator:
            if not _AZURE.match(path):
                form = "abfss://container@account.dfs.core.windows.net/folder"
                yield Finding(here, f"expected {form}, got {shown(path)}")
        elif scheme == "hf" and separator:
            if not _HUB.match(path):
                form = "hf://org or hf://org/repo@revision"
                yield Finding(here, f"expected {form}, got {shown(path)}")
        elif separator and scheme not in ("s3", "gs"):
            yield Finding(
                here,
                "expected s3://bucket/folder, gs://bucket/folder, hf://org or a local folder, "
                f"got {shown(path)}",
            )
        elif separator and (not rest.strip("/") or rest.startswith("/")):
            yield Finding(here, f"{shown(path)} names no bucket; write {scheme}://bucket/folder")
        elif separator and "@" in rest.partition("/")[0]:
            yield Finding(
                here, "credentials do not belong in this file; use the environment or a profile"
            )


def _name_rules(key: str, names: tuple[str, ...]) -> Iterator[Finding]:
    for n, name in enumerate(names):
        if problem := name_problem(name):
            text = f"{shown(name)} is no adapter's name (write it without the model): {problem}"
            yield Finding((key, n), text)
        if name in names[:n]:
            yield Finding((key, n), f"{shown(name)} stands here twice; remove one")


def _plain(path: str) -> str:
    """file:///folder -> /folder, and no slash at the end."""
    if path.startswith("file:///"):
        path = path.removeprefix("file://")
    if path.startswith("s3a://"):  # Hadoop's name for S3
        path = "s3://" + path.removeprefix("s3a://")
    short = path.rstrip("/") or "/"
    # a bare s3:// must stay recognisable, so that it is refused
    return path if short.endswith(":") else short


def _anonymous(store: StoreConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    given = (
        {name: getattr(store, name) for name in store.__struct_fields__}
        if isinstance(store, StoreConfig)
        else dict(store or {})
    )
    return {**given, "anonymous": True}


class AcceleratorConfig(Section, frozen=True, kw_only=True):
    """What the workers run on. With `cpu` they take no GPU, even if the machine has some."""

    IGNORED: ClassVar[Mapping[str, str]] = {"topology": "it describes TPU slices"}

    kind: Literal["cpu", "gpu", "tpu"]
    topology: str | None = None

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        if values.get("kind") == "tpu":
            yield Finding(("kind",), "TPUs are not supported; use 'gpu' or 'cpu'")
