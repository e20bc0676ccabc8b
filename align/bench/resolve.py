"""Stage two of the builder: which model version an image really demonstrates, and with which base checkpoint.

An image hangs in the gallery of one version, but may have been made with another: its data name a checkpoint by hash
and LoRAs by file name. Rows go to the version that was really used; what can't be resolved is dropped (DESIGN 4, step
3).
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from rollouts.api import size_problem


class Known(NamedTuple):
    """What the index knows of an available version."""

    model_id: int
    type: str
    base_model: str
    good: bool  # passed the quality rules


class Demonstration(NamedTuple):
    """An image as evidence for one version: the version, the base checkpoint's version (LoRA only) and weight."""

    version_id: int
    base_version_id: int | None
    lora_weight: float | None


class Dropped(NamedTuple):
    """Why an image demonstrates nothing we can call."""

    rule: str
    value: Any


class VersionIndex:
    """Available versions by id, checkpoint hash and LoRA file name. Size: a few hundred bytes per version."""

    def __init__(self) -> None:
        self.known: dict[int, Known] = {}
        self._by_hash: defaultdict[str, list[int]] = defaultdict(list)
        self._sha256: dict[int, frozenset[str]] = {}
        self._stems: dict[int, frozenset[str]] = {}
        self._loras_by_stem: defaultdict[str, list[int]] = defaultdict(list)
        self._unavailable_hashes: set[str] = set()

    def add(self, draft: dict[str, Any], good: bool) -> None:
        """Index an available version."""
        version_id = draft["version_id"]
        if version_id in self.known:
            return
        self.known[version_id] = Known(draft["model_id"], draft["type"], draft["base_model"], good)
        self._stems[version_id] = frozenset(draft["stems"])
        if draft["type"] == "Checkpoint":
            self._sha256[version_id] = frozenset(draft["sha256"])
            for value in draft["hashes"]:
                self._by_hash[value].append(version_id)
        else:
            for stem in draft["stems"]:
                self._loras_by_stem[stem].append(version_id)

    def add_unavailable(self, hashes: Iterable[str]) -> None:
        """Remember hashes of versions that exist but can't be called, to tell them from unknown ones."""
        self._unavailable_hashes.update(hashes)

    def checkpoint(self, image: dict[str, Any], gallery: int) -> int | Dropped:
        """The checkpoint version an image was made with.

        Args:
            image: Generation data of stage one.
            gallery: The version in whose gallery it hangs; wins where a short hash fits several files.
        """
        if (stated := image["checkpoint_version_id"]) is not None:
            found = self.known.get(stated)
            return stated if found and found.type == "Checkpoint" else Dropped("base_unresolved", stated)
        if not image["checkpoint_hashes"]:
            return Dropped("checkpoint_hash_missing", None)
        for value in image["checkpoint_hashes"]:
            versions = self._by_hash.get(value)
            if not versions:
                continue
            if gallery in versions:
                return gallery
            # Eight digits (AutoV1) may fit different files; ten (AutoV2) begin the SHA256.
            same_file = len(value) >= 10 or len({self._sha256[v] for v in versions}) == 1
            if same_file or len(versions) == 1:
                return min(versions)  # the same weights uploaded again: the oldest, as Civitai's own look-up does
            name = (image["checkpoint_name"] or "").lower()
            named = [v for v in versions if name in self._stems[v]]
            if len(named) == 1:
                return named[0]
            return Dropped("base_ambiguous", value)
        if self._unavailable_hashes.intersection(image["checkpoint_hashes"]):
            return Dropped("base_unavailable", image["checkpoint_hashes"][0])
        return Dropped("base_unresolved", image["checkpoint_hashes"][0])

    def lora(self, image: dict[str, Any], gallery: int, keep_untagged: bool) -> tuple[int, float | None] | Dropped:
        """The LoRA version an image in a LoRA's gallery was made with, and its weight (`None`: not said)."""
        loras = image["loras"]
        if len(loras) > 1:
            return Dropped("several_loras", [name for name, _, _ in loras])
        if not loras:
            return (gallery, None) if keep_untagged else Dropped("lora_not_named", None)
        name, weight, version_id = loras[0]
        if version_id is not None:
            found = self.known.get(version_id)
            ok = found is not None and found.type == "LoRA"
            return (version_id, weight) if ok else Dropped("other_lora", version_id)
        stem = name.lower()
        if stem in self._stems[gallery]:
            return gallery, weight
        others = self._loras_by_stem.get(stem, [])
        same_model = [v for v in others if self.known[v].model_id == self.known[gallery].model_id]
        if len(same_model) == 1:
            return same_model[0], weight  # a sibling version's picture in this version's gallery
        # A name that belongs to no other LoRA is this one under the name its author has on disk.
        return Dropped("other_lora", name) if others else (gallery, weight)

    def demonstration(self, image: dict[str, Any], gallery: int, keep_untagged: bool = True) -> Demonstration | Dropped:
        """What an image of this gallery is evidence for."""
        if image["other_networks"]:
            return Dropped("other_network", image["other_networks"][0])
        weight: float | None = None
        base: int | None = None
        checkpoint = self.checkpoint(image, gallery)
        if self.known[gallery].type == "Checkpoint":
            if image["loras"]:
                return Dropped("checkpoint_with_lora", image["loras"][0][0])
            if isinstance(checkpoint, Dropped):
                return checkpoint
            target = checkpoint
        else:
            found = self.lora(image, gallery, keep_untagged)
            if isinstance(found, Dropped):
                return found
            if isinstance(checkpoint, Dropped):
                return checkpoint
            (target, weight), base = found, checkpoint
            if self.known[base].base_model != self.known[target].base_model:
                return Dropped("base_of_other_architecture", self.known[base].base_model)
        if not self.known[target].good:
            return Dropped("below_quality", target)
        if problem := size_problem(self.known[target].base_model, image["width"], image["height"]):
            return Dropped("size_out_of_range", problem)
        return Demonstration(target, base, weight)
