"""Which model LoRAX's parameters mean: a name that is served, or an adapter that is brought in when it is asked for."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from lorakit.checkpoints.finished import look_at
from lorakit.errors import NotFound, Refused
from lorakit.server.access.rights import Forbidden, Rights
from lorakit.server.dialects.lorax.fetched import Fetching, allowed
from lorakit.server.dialects.lorax.request import MergedAdapters, Parameters
from lorakit.server.file_work import file_work
from lorakit.server.following.changes import Changes
from lorakit.server.following.reconciler import Reconciler
from lorakit.server.following.residency import NoSlot
from lorakit.server.following.served import Served
from lorakit.server.mixes.text import MixText
from lorakit.server.roots import permitted
from lorakit.store.catalog import Revision, newest

BASE = "__base_model__"  # one of LoRAX's names for none
DENSITY = 0.5  # where none is said
_WRITTEN = re.compile(r"[^,=()\s]+")


class Sources:
    """What is brought in keeps the name that it got. Of a folder it is looked whether its files have changed; what was
    fetched stays until it is unloaded, as a Hub or a bucket is not asked anew with each request."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._fetching = Fetching(reconciler.settings)
        self._loads = Changes()

    async def model_of(self, known: Served, given: Parameters, rights: Rights) -> str:
        """A model's name as OpenAI's routes take it. `known` is what whoever asks may see.

        Raises:
            Refused, Forbidden: a source that this server does not take, or not of this key; or what can't be served.
            NotFound: there is nothing there.
            LoadFailed, NoSlot: as `Reconciler.load`.
        """
        if given.merged_adapters is not None:
            merged = given.merged_adapters
            names = [await self._named(known, id, given.adapter_source, rights) for id in merged.ids]
            return str(as_mix(merged, names, as_lorax=self._reconciler.settings.lorax_arithmetic))
        if given.adapter_id in (None, "", BASE):
            return self._reconciler.engine.limits.base
        assert given.adapter_id is not None
        return await self._named(known, given.adapter_id, given.adapter_source, rights)

    async def _named(self, known: Served, id: str, source: str | None, rights: Rights) -> str:
        if source is None:
            return id
        if source == "local":
            return await self._local(known, id, rights)
        address = allowed(source, id, self._reconciler.settings.allow_sources)
        name = name_of(address.shown)
        async with self._loads.of(name):
            if name not in known.runs:
                self._refuse_load(rights, id, name)
                async with self._fetching.fetched(address) as folder:
                    await self._reconciler.load(name, folder)
        return name

    async def _local(self, known: Served, id: str, rights: Rights) -> str:
        """A key that may load nothing learns of no folder that it is not served from."""
        name = name_of(id)
        if not rights.allowance.admin:
            served = served_from(known, id)
            if served is None and name not in known.runs:
                self._refuse_load(rights, id, name)
            return served.name if served is not None else name
        folder = await file_work(permitted, self._reconciler.settings, id, rights)
        served = served_from(known, str(folder))
        return served.name if served is not None else await self._loaded(known, name_of(str(folder)), folder, rights)

    async def _loaded(self, known: Served, name: str, folder: Path, rights: Rights) -> str:
        async with self._loads.of(name):
            if name in known.runs and await file_work(self._is_unchanged, name, folder):
                return name
            if not await file_work((folder / "adapter_config.json").is_file):
                raise NotFound(f"there is no adapter in '{folder}'")
            self._refuse_load(rights, str(folder), name)
            await self._reconciler.load(name, folder)
            return name

    def _is_unchanged(self, name: str, folder: Path) -> bool:
        """Whether what was taken in from there is still there."""
        taken = self._reconciler.store.source(name, str(folder))
        return taken is not None and look_at(folder).signature == taken.signature

    def _refuse_load(self, rights: Rights, id: str, name: str) -> None:
        """Raises Forbidden where a key may not bring in what it names, NoSlot while nobody may."""
        if not rights.allowance.admin:
            raise Forbidden(f"'{id}' is not served, and this key may load nothing: ask with a key made with --admin")
        rights.refuse_name(name)
        if self._reconciler.held:
            raise NoSlot("another server is taking over: ask again")


def as_mix(merged: MergedAdapters, names: list[str], *, as_lorax: bool = False) -> MixText:
    """The mix that is meant, of the deltas themselves; or as LoRAX makes it, of each factor by itself.

    Raises:
        Refused: a name can't stand in one.
    """
    for name in names:
        if not _WRITTEN.fullmatch(name):
            raise Refused(f"'{name}' can't be merged by this name: name the adapter as GET /v1/models does")
    weights: dict[str, float] = {}
    for name, weight in zip(names, merged.weights or [1.0] * len(names), strict=True):
        weights[name] = weights.get(name, 0.0) + weight
    method = merged.merge_strategy or "linear"
    options: dict[str, float | str] = {}
    if method != "linear":
        options["density"] = DENSITY if merged.density is None else merged.density
    if method.endswith("ties") and merged.majority_sign_method is not None:
        options["majority_sign"] = merged.majority_sign_method
    return MixText(tuple(weights.items()), f"lorax:{method}" if as_lorax else method, None, options)


def served_from(known: Served, folder: str) -> Revision | None:
    """The newest revision of a run that is watched which came from a folder."""
    for run in known.runs.values():
        usable = run.without(known.unusable)
        found = [one for one in usable.values() if one.source == folder]
        if found and run.name != name_of(folder):
            return newest(found, run.finishes)
    return None


def name_of(place: str) -> str:
    """A name for what lies at a path or an address: the last part of it, and so much of the digest of the whole that
    another place has another name."""
    last = place.rstrip("/").rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:96] or "adapter"
    return f"{plain}-{hashlib.sha256(place.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
