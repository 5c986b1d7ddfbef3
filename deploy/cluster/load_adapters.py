"""Shell. Copies a folder of adapters into an S3 bucket, which it makes if there is none. Running it
again changes nothing.

python3 load_adapters.py FOLDER s3://BUCKET/PREFIX [--endpoint-url URL] [--region REGION]
Keys come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or the SDK's other places.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError

CONFIG_FILE = "adapter_config.json"
STORE_TIMEOUT_S = 120.0  # a store that starts beside us pulls its image first
RETRY_S = 1.0
REQUEST_TIMEOUT_S = 10
NOT_YET = frozenset({"503", "XMinioServerNotInitialized", "SlowDown"})


def say(line: str) -> None:
    # for the person who reads the container's log
    print(f"load-adapters: {line}", flush=True)  # noqa: T201


def adapters_of(folder: Path) -> list[Path]:
    """The folders that hold an adapter."""
    return sorted(path.parent for path in folder.rglob(CONFIG_FILE))


def files_of(adapter: Path) -> list[Path]:
    """An adapter's files, its config last: a folder without one is no adapter yet, so that nobody
    ever lists half of one.
    """
    files = [
        p
        for p in adapter.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(adapter).parts)
    ]
    return sorted(files, key=lambda path: (path.name == CONFIG_FILE, path))


async def make_bucket(client: Any, bucket: str) -> None:
    """Waits for the store, then makes the bucket if it is not there."""
    async with asyncio.timeout(STORE_TIMEOUT_S):
        while True:
            try:
                await client.head_bucket(Bucket=bucket)
                return
            except ClientError as exc:
                code = str(exc.response.get("Error", {}).get("Code", ""))
                if code in ("404", "NoSuchBucket"):
                    await client.create_bucket(Bucket=bucket)
                    say(f"made the bucket {bucket}")
                    return
                if code not in NOT_YET:
                    raise
            except BotoCoreError as exc:
                say(f"waiting for the store: {exc}")
            await asyncio.sleep(RETRY_S)


async def load(folder: Path, url: str, endpoint_url: str | None, region: str) -> int:
    """How many adapters were copied."""
    bucket, prefix = urlsplit(url).netloc, urlsplit(url).path.strip("/")
    adapters = adapters_of(folder)
    config = AioConfig(
        connect_timeout=REQUEST_TIMEOUT_S,
        read_timeout=REQUEST_TIMEOUT_S,
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        # the newer checksums are not known to every S3 server
        request_checksum_calculation="when_required",
    )
    async with get_session().create_client(
        "s3", endpoint_url=endpoint_url, region_name=region, config=config
    ) as client:
        await make_bucket(client, bucket)
        for adapter in adapters:
            for file in files_of(adapter):
                key = "/".join(filter(None, (prefix, file.relative_to(folder).as_posix())))
                await client.put_object(Bucket=bucket, Key=key, Body=file.read_bytes())
            say(f"{adapter.relative_to(folder)} -> {url}")
    return len(adapters)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Copy a folder of adapters into an S3 bucket.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("url", metavar="s3://BUCKET/PREFIX")
    parser.add_argument("--endpoint-url")
    parser.add_argument("--region", default="us-east-1")
    args = parser.parse_args(argv)
    if urlsplit(args.url).scheme != "s3" or not urlsplit(args.url).netloc:
        parser.error(f"expected s3://BUCKET/PREFIX, got {args.url}")
    try:
        count = asyncio.run(load(args.folder, args.url, args.endpoint_url, args.region))
    except (ClientError, BotoCoreError, TimeoutError) as exc:
        say(f"failed: {exc or f'the store did not answer within {STORE_TIMEOUT_S:g} s'}")
        return 1
    if not count:
        say(f"no folder with an {CONFIG_FILE} below {args.folder}")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
