"""What is simulated, and what comes out of it: see `rollouts.simulation`."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cluster:
    """Machines on paper.

    Attributes:
        workers: One per device.
        gpus_per_node: Workers that share a node's memory and its link to the storage.
        device_gb: For pipelines, per device; what drawing needs beside them is not part of it.
        cpu_gb: For checkpoint files, per node; 0: none, and what is prefetched takes its room on the device. A CPU
            worker is such a device.
        read_gb_per_s: Of a node; none: as many readers as there are get what `costs` say.
        storage_gb_per_s: Of all nodes together; none: no limit.
        prefetch: Whether workers read what the planner says they will need.
    """

    workers: int = 8
    gpus_per_node: int = 8
    device_gb: float = 30.0
    cpu_gb: float = 400.0
    read_gb_per_s: float | None = None
    storage_gb_per_s: float | None = None
    prefetch: bool = True

    def __post_init__(self) -> None:
        if self.workers < 1 or self.gpus_per_node < 1:
            raise ValueError(
                f"`workers` and `gpus_per_node` must be at least 1, but are {self.workers} and {self.gpus_per_node}."
            )
        if self.device_gb < 0 or self.cpu_gb < 0:
            raise ValueError(f"`device_gb` and `cpu_gb` must not be below 0: {self.device_gb}, {self.cpu_gb}.")
        for name in ("read_gb_per_s", "storage_gb_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, or none for no limit, but is {value}.")


@dataclass
class WorkerTime:
    """Seconds of one worker; what is missing to the makespan, it was idle at the end."""

    drawing: float = 0.0
    waiting: float = 0.0
    """For checkpoints to be read and built."""
    lora: float = 0.0
    finished: float = 0.0
    """When its last batch was done."""


@dataclass
class Prediction:
    """What a rollout would take.

    Attributes:
        makespan: Seconds until the last picture.
        loads: Checkpoints read from disk.
        bytes_read: From disk, LoRAs included.
        builds: Pipelines built on a device.
        lora_swaps: LoRAs put into a pipeline.
        batches: Drawn.
        images: Drawn.
        per_worker: In the order of workers.
        timeline: (worker, what, start, end) of every wait and drawing, if asked for; `what` is `load`, or the
            checkpoint drawn with.
    """

    makespan: float = 0.0
    loads: int = 0
    bytes_read: int = 0
    builds: int = 0
    lora_swaps: int = 0
    batches: int = 0
    images: int = 0
    per_worker: list[WorkerTime] = field(default_factory=list)
    timeline: list[tuple[int, str, float, float]] = field(default_factory=list)

    @property
    def gpu_hours(self) -> float:
        """All workers until the last picture."""
        return len(self.per_worker) * self.makespan / 3600

    @property
    def busy_share(self) -> float:
        """Drawing, of all workers' time until the last picture."""
        total = len(self.per_worker) * self.makespan
        return sum(worker.drawing for worker in self.per_worker) / total if total else 0.0

    def summary(self) -> dict[str, Any]:
        """The numbers of a table's row; shares are of all workers' time."""
        total = max(len(self.per_worker) * self.makespan, 1e-12)
        counts = {name: getattr(self, name) for name in ("loads", "bytes_read", "builds", "lora_swaps", "images")}
        return {
            "workers": len(self.per_worker), "makespan": self.makespan, "gpu_hours": self.gpu_hours,
            "busy_share": self.busy_share,
            "waiting_share": sum(worker.waiting for worker in self.per_worker) / total,
            "lora_share": sum(worker.lora for worker in self.per_worker) / total,
            "idle_share": sum(self.makespan - worker.finished for worker in self.per_worker) / total,
            **counts,
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """`summary` and every worker's times, as JSON values."""
        return self.summary() | {"per_worker": [asdict(worker) for worker in self.per_worker]}
