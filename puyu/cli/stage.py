"""`puyu data|tokenizer|pretrain|sft|reward|ppo|quantize|eval|talk`: one stage, from a recipe or from its own config.

    puyu sft recipes/nano.yaml                          that recipe's stage, in its folder
    puyu sft my.yaml --out runs/mine                    a config of this stage alone
    puyu sft --base DIR --set lr=1e-3 --out runs/mine   no file at all
    puyu sft --model DIR --data FILE --method qlora     a first use: what is not given is computed, with reasons

`puyu pretrain CONFIG --dry-run [--gpus N --device h100]` explains the numbers that follow from a config.
With `--auto-resume N` a stage that was killed, or ended with code 75, is begun again up to N times.

All of them go through the chain's runner: resumable, skipped when nothing changed, with a lineage.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from puyu.cli.again import again
from puyu.cli.first_use import TUNING, default_out, first_use, tuning_words
from puyu.cli.options import Options, all_overrides, help_lines, parse
from puyu.dist import SUPERVISED
from puyu.errors import ConfigError
from puyu.log import duration, say


def main(arguments: Sequence[str]) -> int:
    if arguments[0] == "pretrain" and "--dry-run" in arguments:
        from puyu.cli.plan_train import dry_run

        return dry_run(arguments[1:])
    verb, options = arguments[0], parse(arguments[1:])
    from puyu.chain.stages import stage_of

    if options.help:
        flags = "[--out DIR] [--set key=value ...] [--stage NAME] [--auto-resume N]"
        print(f"usage: puyu {verb} [RECIPE.yaml | CONFIG.yaml] {flags}\n")
        print(f"{stage_of(verb).help}; any field below can be given as --field value\n")
        print("\n".join(help_lines(stage_of(verb).config_class())))
        return 0
    if options.auto_resume and "RANK" not in os.environ and SUPERVISED not in os.environ:
        return again([sys.executable, "-m", "puyu", *arguments], tries=options.auto_resume)
    name, config, out = _prepared(verb, options)
    from puyu.chain.run import headline
    from puyu.chain.runner import run_stage

    result = run_stage(name, stage_of(verb), config, out)
    word = "nothing to do: up to date" if result.status == "kept" else f"done in {duration(result.seconds)}"
    say(f"{name}: {word}; {headline(result.numbers)}")
    if verb in ("sft", "prefer"):
        say(f"talk to it:  puyu chat {out}")
    print(json.dumps({"out": str(out), "seconds": round(result.seconds, 2), **result.numbers}, ensure_ascii=False))
    return 0


def _prepared(verb: str, options: Options):  # type: ignore[no-untyped-def]
    from puyu.chain.recipe import is_recipe, load_recipe
    from puyu.chain.stages import stage_of
    from puyu.configure import apply_overrides, build, load_yaml

    if len(options.positional) > 1:
        raise ConfigError(f"puyu {verb} takes one YAML file, got {options.positional}")
    values = load_yaml(Path(options.positional[0])) if options.positional else {}
    overrides = tuning_words(options) if verb in TUNING else []
    overrides += all_overrides(options)
    if is_recipe(values):
        name = options.stage or _first_with(values["stages"], verb)
        recipe = load_recipe(Path(options.positional[0]), [(f"{name}.{key}", value) for key, value in overrides])
        step = recipe.step(name)
        return name, step.config, options.out or step.out
    where = options.positional[0] if options.positional else f"puyu {verb}"
    values = apply_overrides(values, overrides)
    config = build(stage_of(verb).config_class(), values, where=where)
    if verb in TUNING and not options.positional:
        config, options.out = first_use(verb, config, values), options.out or default_out(verb, config)
    if options.out is None:
        raise ConfigError(f"puyu {verb} needs --out DIR", remedy=f"for example --out runs/my-{verb}")
    return verb, config, options.out


def _first_with(stages: dict[str, dict[str, object]], verb: str) -> str:
    for name, section in stages.items():
        if (section or {}).get("verb", name) == verb:
            return name
    raise ConfigError(f"the recipe has no stage of verb {verb!r} (stages: {', '.join(stages)})")
