"""A ds_config.json: what it says here, and that nothing of it is lost in silence."""

import json
from pathlib import Path

import pytest

from puyu.configure import apply_overrides, build
from puyu.errors import ConfigError
from puyu.train.deepspeed import read_ds_config
from puyu.train.sft import SFTConfig

ZERO3 = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 2e-5, "warmup_num_steps": 10,
                  "warmup_type": "linear", "total_num_steps": 100}},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none", "pin_memory": True}, "overlap_comm": True,
                          "stage3_prefetch_bucket_size": "auto"},
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip


def written(path: Path, value: dict) -> Path:
    path.write_text(json.dumps(value))
    return path


def read(tmp_path: Path, value: dict) -> SFTConfig:
    mapped = read_ds_config(written(tmp_path / "ds.json", value))
    return build(SFTConfig, apply_overrides({"base": "b", "data": "d"}, mapped.overrides))


def test_a_usual_file_is_this_config(tmp_path):
    found = read(tmp_path, ZERO3)
    assert (found.layout.params, found.layout.grads, found.layout.states) == ("full", "full", "full")
    assert (found.accumulate, found.optim.clip, found.optim.lr, found.optim.beta2) == (4, 0.5, 2e-5, 0.95)
    assert (found.optim.schedule, found.optim.warmup, found.optim.decay, found.optim.floor) == ("wsd", 10, 1.0, 0.0)
    assert found.dtype == "auto" and found.optim.weight_decay == SFTConfig(base="b", data="d").optim.weight_decay
    notes = " ".join(read_ds_config(tmp_path / "ds.json").notes)
    for name in ("overlap_comm", "stage3_prefetch_bucket_size", "steps_per_print", "total_num_steps"):
        assert name in notes


@pytest.mark.parametrize(
    ("stage", "parts"),
    [(0, "replica replica replica"), (1, "replica replica full"), (2, "replica full full"), (3, "full full full")],
)
def test_stages(tmp_path, stage, parts):
    layout = read(tmp_path, {"zero_optimization": {"stage": stage}}).layout
    assert f"{layout.params} {layout.grads} {layout.states}" == parts


def test_precision_recomputation_and_cosine(tmp_path):
    assert read(tmp_path, {"fp16": {"enabled": True, "loss_scale": 0}}).dtype == "float16"
    assert read(tmp_path, {"bf16": {"enabled": True}}).dtype == "bfloat16"
    found = read(tmp_path, {"activation_checkpointing": {"cpu_checkpointing": True, "partition_activations": True}})
    assert found.memory.checkpoint == "full" and found.memory.offload
    assert "partition_activations" in " ".join(read_ds_config(tmp_path / "ds.json").notes)
    cosine = {"scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.1}}}
    assert read(tmp_path, cosine).optim.floor == 0.1
    assert "log by default" in " ".join(read_ds_config(tmp_path / "ds.json").notes)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"train_batch_size": 64}, "batch_tokens"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type Lamb"),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "amsgrad"),
        ({"scheduler": {"type": "OneCycle"}}, "OneCycle"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}}, "warmup_type"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-6}}}, "warmup_min_lr"),
        ({"sparse_attention": {}}, "sparse_attention"),
        ({"bf16": True}, "bf16 must be an object"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(tmp_path, value, name):
    with pytest.raises(ConfigError, match=name):
        read_ds_config(written(tmp_path / "ds.json", value))
