"""TRL's SFTTrainer for policies that see pictures."""

from pathlib import Path
from typing import Any

from trl import SFTTrainer


class PictureTrainer(SFTTrainer):
    """Reads its checkpoints under the names they were written with.

    `save_pretrained` gives the weights of InternVL and others the names they have in published checkpoints, whereas
    the trainer of transformers (5.23) looks for the names of modules, finds none, and goes on from the first weights
    with no more than a warning. DeepSpeed, FSDP and adapters have ways of their own, which are left as they are.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._read_weights(resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._read_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _read_weights(self, folder: str | None, model: Any = None) -> bool:
        """Load a checkpoint's weights into the model, all of them; False if that is for others to do."""
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        others = self.is_deepspeed_enabled or self.is_fsdp_enabled or hasattr(model, "peft_config")
        if others or folder is None or not (Path(folder) / "config.json").is_file():
            return False
        loaded = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
        model.load_state_dict(loaded.state_dict())
        return True
