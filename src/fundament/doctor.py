"""What would stop Fundament from serving on this machine with these settings, each with the way out."""

import asyncio
import os
import resource
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from sqlalchemy.engine import URL

from fundament.aliases import read_aliases
from fundament.backbone.device import Dtype, Placement, fastest_format, place, speeds
from fundament.backbone.resources import n_cores
from fundament.buckets import first_line, require_client
from fundament.catalog import EMBEDDED
from fundament.config import Settings
from fundament.depot import Kind, depot_of, probe
from fundament.engine.loading import load_model, most_bytes
from fundament.engine.local import budget_of
from fundament.engine.weights import (
    WITHOUT_SAFETENSORS,
    Local,
    damage,
    embedded,
    from_argument,
    pulled,
    read_receipt,
    refuse_another,
    verify_embedded,
)
from fundament.errors import CheckpointError, FundamentError, UnavailableError
from fundament.limits import limits_of
from fundament.models import PROGRAM
from fundament.server import is_loopback, listen, refuse_open
from fundament.store import keys, migrate
from fundament.store.database import connected, is_sqlite, locate, shown

Level = Literal["ok", "warning", "problem"]

_LITTLE_DISK_BYTES, _NO_DISK_BYTES = 1_000_000_000, 10_000_000
_FEW_FILES = 4096
_PROBE = "fundament:doctor"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: how it went, of what, and in words; where it is not `ok`, the words say what to do."""

    level: Level
    subject: str
    detail: str


def examine(settings: Settings) -> list[Finding]:
    """Every check, in the order in which a start would meet them."""
    findings = [check_device(settings.device, settings.dtype), check_cores(settings.threads)]
    placement = None if findings[0].level == "problem" else place(settings.device, settings.dtype)
    models, locals_ = check_models(
        settings.models,
        settings.data_dir,
        dtype=placement.states if placement else torch.float32,
        allow_torchscript=settings.allow_torchscript,
    )
    findings += models
    findings += check_aliases(settings.aliases, locals_, settings.data_dir)
    if placement:
        budget = budget_of(int(settings.memory_gb * 1e9), placement.device)
        findings.append(check_memory(locals_, placement, budget, cache_bytes=int(settings.chat_memory_gb * 1e9)))
    return [
        *findings,
        check_data_dir(settings.data_dir),
        *check_open_files(),
        *check_files(settings),
        *check_buckets(settings),
        *check_store(settings),
        *check_redis(settings.redis_url),
        check_port(settings.host, settings.port),
    ]


def check_device(device: str, dtype: Dtype) -> Finding:
    """Where models would run, in which number format, and why in that one."""
    try:
        placement = place(device, dtype)
    except FundamentError as error:
        return Finding("problem", "device", error.detail)
    if placement.device.type == "cuda":
        return _check_cuda(placement)
    where, found, fastest = f"{placement.device} in {placement.dtype_name}", speeds(), fastest_format()
    rates = {"bfloat16": found.get(torch.bfloat16), "float16": found.get(torch.float16)}
    told = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items() if rate)
    told = f"times as fast as float32 on this CPU: {told}" if told else "this CPU multiplies nothing else"
    if placement.dtype == torch.bfloat16 and fastest != "bfloat16":
        return Finding("warning", "device", f"{where}: {told}; --dtype {fastest} is faster")
    return Finding("ok", "device", f"{where}: {told}")


def _check_cuda(placement: Placement) -> Finding:
    name = torch.cuda.get_device_name(placement.device.index or 0)
    return Finding("ok", "device", f"{placement.device} ({name}) in {placement.dtype_name}")


def check_cores(n_threads: int) -> Finding:
    """How many cores would work, and whether this process may use that many."""
    usable = n_cores()
    if n_threads > usable:
        return Finding(
            "warning", "cores", f"{n_threads} threads on {usable} cores only wait; FUNDAMENT_THREADS=0 is best"
        )
    return Finding("ok", "cores", f"{n_threads or usable} of {usable}")


def check_models(
    arguments: Iterable[str], data_dir: Path, *, dtype: torch.dtype = torch.float32, allow_torchscript: bool = False
) -> tuple[list[Finding], list[Local]]:
    """The models that would be served: there, whole, and as their families load them.

    Returns:
        The findings, and the models asked for that are fine.
    """
    findings: list[Finding] = []
    fine: list[Local] = []
    for argument in list(arguments) or [EMBEDDED.id]:
        try:
            local = from_argument(argument, data_dir, allow_torchscript=allow_torchscript)
            refuse_another(local, fine)
            finding = check_weights(local, dtype)
        except CheckpointError as error:
            finding = Finding("problem", f"model {argument}", error.detail)
        else:
            fine.append(local)
        findings.append(finding)
    named = {local.spec.id for local in fine}
    try:
        there = pulled(data_dir)
    except CheckpointError as error:
        return [*findings, Finding("problem", "models", error.detail)], fine
    for model, local in there.items():
        if model not in named:
            try:
                findings.append(check_weights(local, dtype))
            except CheckpointError as error:
                findings.append(Finding("problem", f"model {model}", error.detail))
    return findings, fine


def check_aliases(arguments: Iterable[str], locals_: Iterable[Local], data_dir: Path) -> list[Finding]:
    """Whether each alias names a model that would be served; nothing where there are none."""
    if not (asked := list(arguments)):
        return []
    try:
        served = {model: local.spec for model, local in pulled(data_dir).items()}
        served |= {local.spec.id: local.spec for local in locals_}
        aliases = read_aliases(asked, served)
    except FundamentError as error:
        return [Finding("problem", "aliases", error.detail)]
    return [Finding("ok", "aliases", ", ".join(f"{name} answers as {model}" for name, model in aliases.items()))]


def check_weights(local: Local, dtype: torch.dtype = torch.float32) -> Finding:
    """Whether a model's files are the ones that were published, as far as that is known, and load.

    They are loaded but for the numbers, which stay on the disk: names, shapes, tokenizer and settings are looked at.

    Raises:
        CheckpointError: they are not.
    """
    spec, subject = local.spec, f"model {local.spec.id}"
    size = f"family {spec.family}, {local.n_bytes / 1e6:,.0f} MB"
    if local == embedded():
        verify_embedded(local)
        return Finding("ok", subject, f"{size}, SHA-256 as released")
    if spec.family == PROGRAM:  # nothing of it is looked at without running it
        return Finding("ok", subject, f"{size}, in {local.directory}")
    receipt = read_receipt(local.directory)
    if receipt and (broken := damage(local.directory, receipt)):
        raise CheckpointError(
            f"{', '.join(broken)} of {local.directory} are damaged. Mend it: fundament pull {spec.id}"
        )
    if missing := [name for name in WITHOUT_SAFETENSORS.get(spec.id, ()) if not (local.directory / name).is_file()]:
        raise CheckpointError(f"{local.directory} has no {', '.join(missing)}")
    load_model(local, Placement(torch.device("meta"), dtype))
    if receipt is None:
        return Finding("ok", subject, f"{size}, in {local.directory}")
    if spec.revision not in (None, receipt.revision):
        return Finding(
            "warning",
            subject,
            f"{size}, pulled at {receipt.revision[:12]}; this release is tested with {str(spec.revision)[:12]}. "
            f"Get that: fundament pull {spec.id}",
        )
    return Finding("ok", subject, f"{size}, {receipt.repo} at {receipt.revision[:12]}, {len(receipt.files)} files")


def check_memory(locals_: Iterable[Local], placement: Placement, budget_bytes: int, *, cache_bytes: int = 0) -> Finding:
    """Whether the models fit the memory that they may take, by the size of their weights in their number format.

    Args:
        locals_: the models.
        placement: where they would run.
        budget_bytes: most that all may take.
        cache_bytes: what the conversations of a chat model take beside its weights.
    """
    try:
        sizes = {local.spec.id: most_bytes(local, placement, cache_bytes) for local in locals_}
    except CheckpointError as error:
        return Finding("problem", "memory", f"not known, for lack of weights: {error.detail}")
    needed = sum(sizes.values())
    told = f"{needed / 1e6:,.0f} MB of weights in {placement.dtype_name}, {budget_bytes / 1e9:.1f} GB allowed"
    too_large = [model for model, size in sizes.items() if size > budget_bytes]
    if too_large:
        return Finding(
            "problem", "memory", f"{told}: no room for {', '.join(too_large)}; raise --memory-gb, or free some"
        )
    if needed > budget_bytes:
        return Finding(
            "warning", "memory", f"{told}: not all stay loaded at once; raise --memory-gb, or name fewer models"
        )
    return Finding("ok", "memory", told)


def check_data_dir(data_dir: Path) -> Finding:
    """Whether models, uploads and what jobs make can be put there, and how much room is left."""
    there = _nearest(data_dir)
    if not there.is_dir():
        return Finding("problem", "data", f"{there} is a file; choose a directory: --data-dir")
    free = shutil.disk_usage(there).free
    told = f"{data_dir}, {free / 1e9:.1f} GB free"
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("warning", "data", f"{told}, but not writable: nothing can be pulled; --data-dir")
    kept = (data_dir / kind for kind in get_args(Kind))
    if closed := [path for path in kept if path.exists() and not os.access(path, os.W_OK | os.X_OK)]:
        return Finding(
            "problem",
            "data",
            f"{closed[0]} is not writable: no uploads and no jobs; let the user of fundament write it",
        )
    if free < _NO_DISK_BYTES:
        return Finding("problem", "data", f"{told}: no room for the store; make some, or --data-dir")
    if free < _LITTLE_DISK_BYTES:
        return Finding("warning", "data", f"{told}: too little for most models; make room, or --data-dir")
    return Finding("ok", "data", told)


def _nearest(path: Path) -> Path:
    """The path, or the nearest directory above it that is there, as far as this user may see."""
    return next(each for each in (path, *path.parents) if os.path.exists(each))  # noqa: PTH110 - Path.exists raises


def check_store(settings: Settings) -> list[Finding]:
    """Whether the store answers and has this release's schema, and whether those who can call have keys."""
    store, n_keys = _check_store(settings)
    return [store, _check_keys(settings, n_keys)]


def _check_store(settings: Settings) -> tuple[Finding, int | None]:
    """The store, and how many of its keys work; None where they cannot be counted."""
    try:
        url = locate(settings.store_url, settings.data_dir)
        if is_sqlite(url) and _nearest(file := Path(str(url.database))) != file:
            return _check_place(file), 0
        with connected(url) as connection:
            found = migrate.version_of(connection)
            n_keys = connection.execute(keys.working()).scalar_one() if found == migrate.newest() else None
        return _check_schema(url, found), n_keys
    except FundamentError as error:
        return Finding("problem", "store", error.detail), None


def _check_place(file: Path) -> Finding:
    there = _nearest(file.parent)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Finding("ok", "store", f"{file}, made at the first start")
    return Finding("problem", "store", f"{file} cannot be made: {there} is not writable; --data-dir, or store_url")


def _check_schema(url: URL, found: str | None) -> Finding:
    newest = migrate.newest()
    where = shown(url)
    if is_sqlite(url) and not os.access(str(url.database), os.W_OK):
        return Finding("problem", "store", f"{where} is not writable; let the user of fundament write it")
    if found == newest:
        return Finding("ok", "store", f"{where}, schema {found}")
    migrate.refuse_newer(found, url)
    told = f"{where} has {f'schema {found}' if found else 'no schema yet'}, this release works with {newest}"
    if is_sqlite(url):
        return Finding("ok", "store", f"{told}: brought there at the next start")
    return Finding("problem", "store", f"{told}: fundament db upgrade")


def _check_keys(settings: Settings, n_keys: int | None) -> Finding:
    if settings.auth:
        if n_keys is None:
            return Finding("ok", "keys", "not counted until the store can be read and has this release's schema")
        if not n_keys:
            return Finding("warning", "keys", "no key works yet: fundament keys create NAME")
        return Finding("ok", "keys", f"{n_keys} keys work")
    try:
        refuse_open(settings.host, settings.auth)
    except FundamentError as error:
        return Finding("problem", "keys", error.detail)
    if not is_loopback(settings.host):
        return Finding("warning", "keys", f"none are asked for, as asked: whoever reaches {settings.host}")
    return Finding("ok", "keys", "none are asked for: only this machine's users can call")


def check_open_files() -> list[Finding]:
    """Whether the process may open as many files as callers may come; nothing where it may."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most == resource.RLIM_INFINITY or most >= _FEW_FILES:
        return []
    told = f"{most} at most, connections included; who comes then is turned away. Allow {_FEW_FILES}: ulimit -n"
    return [Finding("warning", "open files", told)]


def check_files(settings: Settings) -> list[Finding]:
    """Whether the bucket of uploads and jobs lets us write, read and remove; nothing where there is none."""
    if not (url := settings.files_url):
        return []
    try:
        asyncio.run(probe(depot_of(url, settings.data_dir)))
    except UnavailableError as error:
        return [
            Finding("problem", "files", f"{url} does not answer as it should: {first_line(error.__cause__ or error)}")
        ]
    except FundamentError as error:
        return [Finding("problem", "files", error.detail)]
    try:
        tempfile.gettempdir()  # where a job's input is copied to be divided
    except OSError as error:
        return [Finding("problem", "files", f"jobs need a temporary directory: {error.strerror}. Set TMPDIR.")]
    return [Finding("ok", "files", f"{url} answers")]


def check_buckets(settings: Settings) -> list[Finding]:
    """Whether what reads the buckets of batch jobs is installed; nothing where there are none."""
    if not settings.input_buckets:
        return []
    try:
        require_client()
    except FundamentError as error:
        return [Finding("problem", "buckets", error.detail)]
    return [Finding("ok", "buckets", f"jobs may read {', '.join(settings.input_buckets)}")]


def check_redis(url: str) -> list[Finding]:
    """Whether the Redis that counts limits answers; nothing where there is none."""
    if not url:
        return []
    try:
        limits_of(url)
        from redis import Redis, RedisError

        with Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5) as client:
            client.set(_PROBE, "", ex=1)  # one that is full, or a replica, answers a ping
    except FundamentError as error:
        return [Finding("problem", "limits", error.detail)]
    except RedisError as error:
        return [Finding("problem", "limits", f"Redis does not count, and requests with limits would be 503: {error}")]
    return [Finding("ok", "limits", "Redis answers and can be written")]


def check_port(host: str, port: int) -> Finding:
    """Whether the address can be listened on, tried as a start does."""
    try:
        sockets = listen(host, port)
    except FundamentError as error:
        return Finding("problem", "port", error.detail)
    for opened in sockets:
        opened.close()
    return Finding("ok", "port", f"{host}:{port} is free" if port else f"{host}, a free port")
