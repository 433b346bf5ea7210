"""`puyu export`: a checkpoint as one file for other programs.

puyu export --model runs/nano/ppo --gguf nano.gguf --type q8_0
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from puyu.cli.options import all_overrides, help_lines, parse
from puyu.configure import Config, apply_overrides, build
from puyu.errors import ConfigError


class ExportConfig(Config):
    model: Path
    """Checkpoint directory of a language model, quantized or not."""
    gguf: Path
    """The file to write."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = "q8_0"
    """Numbers of the matrices; vectors stay f32."""
    pre: str | None = None
    """llama.cpp's name for how the tokenizer cuts text, where it cannot be told."""


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.help:
        print("usage: puyu export --model DIR --gguf OUT.gguf [--type f32|f16|bf16|q8_0|q4_0] [--pre NAME]\n")
        print("\n".join(help_lines(ExportConfig)))
        return 0
    if options.positional or options.out is not None:
        raise ConfigError("puyu export takes --model DIR and --gguf FILE", remedy="puyu export --help")
    config = build(ExportConfig, apply_overrides({}, all_overrides(options)), where="puyu export")
    from puyu.quant.gguf import export_gguf

    done = export_gguf(config.model, config.gguf, kind=config.type, pre=config.pre)
    print(f"{done.path}: {done.tensors} tensors, {done.size:,} bytes")
    return 0
