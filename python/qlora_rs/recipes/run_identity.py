"""What makes a resumed run the same run: equal settings, data, base model and environment.

``run.json`` records it when a run begins; ``finetune(resume=True)`` compares before it continues.
"""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import qlora_rs
from qlora_rs.errors import QloraError
from qlora_rs.recipes import base_model
from qlora_rs.recipes import output_folder as folder
from qlora_rs.recipes.data import TrainingData
from qlora_rs.recipes.progress import Progress
from qlora_rs.recipes.settings import FinetuneSettings, option


def run_record(settings: FinetuneSettings, data: TrainingData) -> dict[str, Any]:
    """Build run.json: what must be equal for a resumed run to continue the same computation."""
    import torch
    import transformers
    import trl

    paths = {
        name: os.path.abspath(os.path.expanduser(getattr(settings, name)))
        for name in ("model", "data", "output")
    }
    return {
        "format": folder.RUN.format,
        "settings": replace(settings, **paths).to_json(),
        "data_sha256": data.sha256,
        "model_identity": base_model.model_identity(settings.model),
        "environment": {
            "qlora_rs": qlora_rs.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
    }


def settings_of_run(output: str | Path) -> FinetuneSettings:
    """Read the settings of the run in ``output``, to resume it without repeating its options."""
    output = Path(output).expanduser()
    if not folder.is_ours(output):
        raise QloraError(
            f"{output} holds no fine-tuning run to resume (no {folder.RUN_FILE} of ours); start "
            "one without --resume"
        )
    record = folder.read_json(output / folder.RUN_FILE)
    settings = FinetuneSettings.from_json(record["settings"])
    return replace(settings, output=str(output))


def check_same_run(output: Path, record: dict[str, Any], progress: Progress) -> None:
    """Refuse to resume a run with other settings, data or model; warn of other versions."""
    settings_of_run(output)
    earlier = folder.read_json(output / folder.RUN_FILE)
    if (output / folder.SUMMARY_FILE).exists():
        raise QloraError(
            f"the run in {output} is complete; its adapter is in "
            f"{output / folder.ADAPTER_FOLDER}. Use another --output for a new run"
        )
    for name, value in record["settings"].items():
        # Files may have moved; their digests below say whether they are the same.
        if name not in ("model", "data", "output") and value != earlier["settings"][name]:
            raise QloraError(
                f"{option(name)} was {earlier['settings'][name]} when the run in {output} began "
                f"and is {value} now; resume it without {option(name)}, or start again with "
                "--overwrite"
            )
    for key, what, settings_name in (
        ("data_sha256", "the training data", "data"),
        ("model_identity", "the base model", "model"),
    ):
        if record[key] != earlier[key]:
            raise QloraError(
                f"{what} ({record['settings'][settings_name]}) is not what the run in {output} "
                "began with (its digest differs); give the same file, or start again with "
                "--overwrite"
            )
    changed = [
        f"{name} {earlier['environment'].get(name)} -> {value}"
        for name, value in record["environment"].items()
        if earlier["environment"].get(name) != value
    ]
    if changed:
        progress.warn(
            f"The run began with another environment ({', '.join(changed)}); it continues, but "
            "perhaps not bit for bit"
        )
