"""Writing pictures into a store's folder: what a worker can do on its own, while one process keeps the index."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from rollouts.picture_png import encode_picture, pixels_digest
from rollouts.requests import RenderJob, RenderRequest, RenderResult
from rollouts.store_files import StoreFiles, file_name


class Written(NamedTuple):
    """What the index has to know of a picture."""

    size: int | None
    """Bytes of its file; None: it was not kept."""
    pixels: str
    """SHA-256 of its pixels (`picture_png.pixels_digest`)."""


def write_pictures(
    files: StoreFiles,
    rows: Iterable[tuple[RenderJob, Mapping[str, Any], RenderResult]],
    *,
    keep_images: bool = True,
    num_workers: int = 4,
) -> dict[str, Written]:
    """Write the pictures of some results; they outlive a power failure once this returns.

    Args:
        files: Of the store.
        rows: Job, request (`request_to_dict`) and result; those without a picture are passed over.
        keep_images: Without it nothing is written.
        num_workers: Threads.

    Raises:
        StoreError: A file can't be written.
    """

    def write(row: tuple[RenderJob, Mapping[str, Any], RenderResult]) -> tuple[str, Written]:
        job, request, result = row
        assert result.image is not None
        if not keep_images:
            return job.key, Written(None, pixels_digest(result.image))
        data, pixels = encode_picture(result.image, job, picture_metadata(job, request), seconds=result.seconds)
        files.write(file_name(job.key), data)
        return job.key, Written(len(data), pixels)

    drawn = [row for row in rows if row[2].image is not None]
    with ThreadPoolExecutor(max(1, min(num_workers, len(drawn)))) as pool:
        written = dict(pool.map(write, drawn))
    if keep_images:
        files.settle(file_name(key) for key in written)
    return written


def request_to_dict(request: RenderRequest) -> dict[str, Any]:
    """A request as JSON holds it; `rollouts.store.request_from_dict` reads it."""
    return vars(request) | {"call": request.call.to_dict()}


def picture_metadata(job: RenderJob, request: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture says of itself, enough to draw it again: `job` and `request`."""
    content = job._asdict() | {"batch_key": job.batch_key._asdict()}
    del content["key"]
    return {"job": content, "request": request}
