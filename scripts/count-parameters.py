"""Writes counts.json beside the configs of public checkpoints: how many parameters transformers 5.23.0 builds from each.

    python scripts/count-parameters.py

Nothing is allocated or downloaded. A tied head counts once; buffers (such as DeepSeek's selection biases), prediction layers and the
scales of quantised files don't count. Of a model that also sees, the text part is counted.
"""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

CONFIGS = Path(__file__).parent.parent / "crates/pmetal-models/tests/configs"


def count(path):
    values = json.loads(path.read_text())
    values = values.get("text_config", values)
    values.pop("quantization_config", None)
    if (values.get("rope_scaling") or {}).get("type") == "su":
        values["rope_scaling"]["type"] = "longrope"  # transformers 5.23 stumbles over the old name
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def main():
    paths = sorted(path for path in CONFIGS.glob("*.json") if path.name != "counts.json")
    counts = {path.stem: count(path) for path in paths}
    (CONFIGS / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
