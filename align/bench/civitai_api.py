"""Read models, images and hashes from Civitai's public REST API v1.

    with CivitaiClient(BASE_URL, cache_dir="cache/civitai") as client:
        for model in client.iter_models(types=("Checkpoint", "LORA"), base_models=("SD 1.5",), with_images=True):
            ...

Every answered request is kept on disk (`align.bench.cached_http`), so a run that was stopped goes on where it was.

Routes and their limits: https://developer.civitai.com/docs/api/public-rest and the handlers in
https://github.com/civitai/civitai, `src/pages/api/v1`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from align.bench.cached_http import BadBodyError, CachedHTTP, Request, RequestError

logger = logging.getLogger(__name__)

BASE_URL = "https://civitai.com/api/v1"
MAX_MODELS_PER_PAGE = 100
MAX_IMAGES_PER_PAGE = 200
MAX_HASHES_PER_CALL = 10_000

_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
# AutoV1 and CRC32 have 8 digits, AutoV2 10, AutoV3 12, SHA256 and BLAKE3 64.
_ANY_HASH = re.compile(r"[0-9A-Fa-f]{8}|[0-9A-Fa-f]{10}|[0-9A-Fa-f]{12}|[0-9A-Fa-f]{64}")


class CivitaiClient(CachedHTTP):
    """Civitai's public REST API; made, opened and closed like any `CachedHTTP`."""

    def iter_models(
        self,
        *,
        base_models: Sequence[str] = (),
        types: Sequence[str] = (),
        limit: int = MAX_MODELS_PER_PAGE,
        sort: str | None = None,
        period: str | None = None,
        nsfw: bool = False,
        max_models: int | None = None,
        with_images: bool = False,
        images_per_version: int = 20,
    ) -> Iterator[dict[str, Any]]:
        """Yield `/models` items, each model once.

        Embedded images often come without `meta` (prompt, sampler, ...), which only `/images` serves.

        Args:
            base_models: For example "SD 1.5"; empty is all.
            types: For example "LORA"; empty is all.
            limit: Models per page, 1 to 100.
            sort: For example "Most Downloaded"; None is the site's default.
            period: For example "AllTime"; None is the site's default.
            nsfw: Whether to ask for adult content as well.
            max_models: Stop after so many; None is all.
            with_images: Replace the images of each version of which no embedded image has `meta` by its gallery.
            images_per_version: How many images of a gallery are read.

        Raises:
            ValueError: `limit` or `images_per_version` is out of range.
            RequestError: A page failed for good, or the cursors run in a circle.
        """
        for name, values in (("base_models", base_models), ("types", types)):
            if isinstance(values, str):
                raise ValueError(f'`{name}` must be a sequence of names such as ("{values}",), but got a string.')
        if not 1 <= limit <= MAX_MODELS_PER_PAGE:
            raise ValueError(f"`limit` must be between 1 and {MAX_MODELS_PER_PAGE} models per page, but got {limit}.")
        if with_images and images_per_version < 1:
            raise ValueError(f"`images_per_version` must be at least 1, but got {images_per_version}.")
        params = [("limit", str(limit)), ("nsfw", _flag(nsfw)), ("withMeta", "true")]
        params += [("types", value) for value in types] + [("baseModels", value) for value in base_models]
        params += [(name, value) for name, value in (("sort", sort), ("period", period)) if value is not None]
        return self._models(params, max_models, images_per_version if with_images else 0, nsfw)

    def iter_images(self, model_version_id: int, *, max_images: int, nsfw: bool = False) -> Iterator[dict[str, Any]]:
        """Yield up to `max_images` gallery images of a version in the shape of the images embedded in `/models`.

        Raises:
            ValueError: `max_images` is below 1.
            RequestError: A page failed for good, or the cursors run in a circle.
        """
        if max_images < 1:
            raise ValueError(f"`max_images` must be at least 1, but got {max_images}.")
        # modelVersionId rather than modelId: with modelId alone the sort orders collapse to newest first.
        params = [
            ("limit", str(min(max_images, MAX_IMAGES_PER_PAGE))),
            ("modelVersionId", str(model_version_id)),
            ("nsfw", _flag(nsfw)),
            ("withMeta", "true"),
        ]
        return self._images(params, max_images)

    def resolve_hashes(self, sha256s: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Map SHA256 (upper case) to (model id, model version id), 10,000 per request.

        Unknown hashes are absent. A file published more than once belongs to its oldest (lowest) version.

        Raises:
            ValueError: A value is not a SHA256; this route takes no other hash, see `version_by_hash`.
            RequestError: A request failed for good.
        """
        values = [sha256s] if isinstance(sha256s, str) else sha256s
        wanted = {_checked_hash(value, _SHA256, "a SHA256 of 64 hexadecimal digits") for value in values}
        ordered = sorted(wanted)
        found: dict[str, tuple[int, int]] = {}
        for start in range(0, len(ordered), MAX_HASHES_PER_CALL):
            batch = ordered[start : start + MAX_HASHES_PER_CALL]
            request = Request("POST", "/model-versions/by-hash/ids", body=batch)
            for row in self.fetch(request, _check_hash_rows)[1]:
                sha256 = row["hash"].upper()
                pair = (row["modelId"], row["modelVersionId"])
                if sha256 in wanted and (sha256 not in found or pair[1] < found[sha256][1]):
                    found[sha256] = pair
        return found

    def version_by_hash(self, any_hash: str) -> dict[str, Any] | None:
        """The model version a file hash belongs to, or None when Civitai knows no such file.

        Args:
            any_hash: AutoV1, AutoV2, AutoV3, SHA256, CRC32 or BLAKE3, in either case.

        Raises:
            ValueError: Not hexadecimal or not 8, 10, 12 or 64 digits long.
            RequestError: The request failed for good.
        """
        digits = _checked_hash(any_hash, _ANY_HASH, "a hash of 8, 10, 12 or 64 hexadecimal digits")
        request = Request("GET", f"/model-versions/by-hash/{digits}")
        status, body = self.fetch(request, _check_object, absent_ok=True)
        return None if status == 404 else body

    def model(self, model_id: int) -> dict[str, Any] | None:
        """One object of `/models` by its id, or None when there is no such model (any more).

        Raises:
            RequestError: The request failed for good.
        """
        status, body = self.fetch(Request("GET", f"/models/{int(model_id)}"), _check_object, absent_ok=True)
        return None if status == 404 else body

    def _models(
        self, params: list[tuple[str, str]], max_models: int | None, images: int, nsfw: bool
    ) -> Iterator[dict[str, Any]]:
        seen: set[Any] = set()
        count = 0
        for model in self._items("/models", params) if max_models is None or max_models > 0 else ():
            # The catalogue moves while it is paged, so a model can turn up on two pages.
            identity = model.get("id")
            if identity is not None:
                if identity in seen:
                    continue
                seen.add(identity)
            if images:
                self._fill_images(model, images, nsfw)
            yield model
            count += 1
            if count == max_models:
                return

    def _images(self, params: list[tuple[str, str]], max_images: int) -> Iterator[dict[str, Any]]:
        for count, image in enumerate(self._items("/images", params), start=1):
            yield _embedded_shape(image)
            if count >= max_images:
                return

    def _fill_images(self, model: dict[str, Any], count: int, nsfw: bool) -> None:
        """Give each version whose embedded images lack `meta` its gallery, if it has one."""
        for version in model.get("modelVersions") or ():
            if not isinstance(version, dict) or not isinstance(version.get("id"), int):
                continue
            embedded = version.get("images") or []
            if any(isinstance(image, dict) and image.get("meta") for image in embedded):
                continue
            try:
                gallery = list(self.iter_images(version["id"], max_images=count, nsfw=nsfw))
            except RequestError as error:
                if error.status != 404:
                    raise
                logger.warning("No gallery for version %s of model %s: %s", version["id"], model.get("id"), error)
                continue
            if gallery:
                version["images"] = gallery

    def _items(self, path: str, params: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        """All items of a cursor-paged route."""
        seen: set[str] = set()
        cursor: str | None = None
        while True:
            extra = [] if cursor is None else [("cursor", cursor)]
            request = Request("GET", path, tuple(params + extra))
            _, page = self.fetch(request, _check_page)
            yield from page["items"]
            following = (page.get("metadata") or {}).get("nextCursor")
            if following is None or following == "":
                return
            cursor = str(following)
            if cursor in seen:
                # Kept, this page would lead every restart into the same circle.
                self.forget(request)
                reason = f"cursor loop, `nextCursor` {cursor!r} came a second time"
                raise RequestError(reason, url=self.url(request), status=200, attempts=1)
            seen.add(cursor)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _checked_hash(value: Any, pattern: re.Pattern[str], expected: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"Expected {expected}, but got {value!r}.")
    return value.upper()


def _check_object(body: Any) -> None:
    if not isinstance(body, dict):
        raise BadBodyError(f"the body is not a JSON object but {type(body).__name__}")


def _check_page(body: Any) -> None:
    _check_object(body)
    if not isinstance(body.get("items"), list) or not all(isinstance(item, dict) for item in body["items"]):
        raise BadBodyError("the page has no list `items` of objects")
    if not isinstance(body.get("metadata") or {}, dict):
        raise BadBodyError("`metadata` of the page is not an object")


def _check_hash_rows(body: Any) -> None:
    fields = {"hash": str, "modelId": int, "modelVersionId": int}
    if not isinstance(body, list):
        raise BadBodyError("the body is not a list of {modelVersionId, modelId, hash}")
    for row in body:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in fields.items()):
            raise BadBodyError(f"a row is not {{modelVersionId, modelId, hash}}: {row!r}"[:200])


def _embedded_shape(image: dict[str, Any]) -> dict[str, Any]:
    """An `/images` record in the shape of an image inside `/models`.

    There `nsfw` is a name ("None", "Soft", ...) and `nsfwLevel` a bit mask (1 is PG); here `nsfw` is a boolean,
    `nsfwLevel` the name and `browsingLevel` the mask. `meta` comes flat or wrapped as {id, meta}.
    """
    meta = image.get("meta")
    if isinstance(meta, dict) and "meta" in meta and meta.keys() <= {"id", "meta"}:
        meta = meta["meta"]
    shaped = {name: image.get(name) for name in ("id", "url", "width", "height")}
    shaped["meta"] = meta if isinstance(meta, dict) else None
    shaped |= {name: image[name] for name in ("hash", "type", "nsfw", "nsfwLevel") if name in image}
    if isinstance(image.get("nsfwLevel"), str):
        shaped["nsfw"] = shaped.pop("nsfwLevel")
    if isinstance(image.get("browsingLevel"), int):
        shaped["nsfwLevel"] = image["browsingLevel"]
    return shaped
