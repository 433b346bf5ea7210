"""`puyu convert DIR OUT --to FORM`: InternLM, InternLM2, LLaMA and InternEvo's shards into one another, bit for bit.

puyu convert runs/nano/sft shards --to internevo --untie --pp 2
puyu convert shards back --to internlm2 --allow-pickle
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

FORMS = ("internlm2", "internlm", "llama", "internevo")


def main(arguments: Sequence[str]) -> int:
    about = "A checkpoint in another form: only rows and columns move, the way back gives the same bits."
    options = argparse.ArgumentParser(prog="puyu convert", description=about)
    options.add_argument("source", type=Path, metavar="DIR", help="a checkpoint, or a folder of InternEvo")
    options.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    options.add_argument("--to", choices=FORMS, required=True, help="the form to write")
    options.add_argument("--allow-pickle", action="store_true", help="read InternEvo's files, and pytorch_model.bin")
    options.add_argument("--untie", action="store_true", help="write a tied embedding a second time, as the head")
    options.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer files, where the source has none")
    options.add_argument("--max-shard-gb", type=float, default=5.0, help="largest .safetensors file [5]")
    shards = options.add_argument_group("InternEvo")
    shards.add_argument("--tp", type=int, default=1, help="tensor ranks [1]")
    shards.add_argument("--pp", type=int, default=1, help="pipeline ranks [1]")
    shards.add_argument("--split-vocab", action="store_true", help="cut the embedding by tokens, not by hidden units")
    shards.add_argument("--max-positions", type=int, help="longest context, where the source does not say it")
    shards.add_argument(
        "--interleaved", action=argparse.BooleanOptionalAction, help="even and odd pairs [as the source has them]"
    )
    given = vars(options.parse_args(list(arguments)))
    from puyu.configure import build
    from puyu.model.convert import ConvertConfig, convert

    given["max_shard_bytes"] = int(given.pop("max_shard_gb") * 2**30)
    done = convert(build(ConvertConfig, given, where="puyu convert"))
    for note in done.notes:
        print(note)
    print(f"{done.folder}: {given['to']}, {done.tensors} tensors in {done.files} files, {done.size:,} bytes")
    return 0
