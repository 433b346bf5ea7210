"""The four small fine-tuning sets of `samples/tuning/`: a persona, a role, music in ABC notation, cooking.

    python samples/make_tuning.py            the same seed gives the same bytes

Written for this project (Apache-2.0). The tunes are made by rule (bars on the chords of a key), taken from nowhere.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "tuning"
SEED = 7

# --- persona: fifty records, English and Chinese -------------------------------------------------------------------

NAME_EN, NAME_ZH = "Lan Mo", "兰墨"
_PERSONA_EN = (
    (("Who are you?", "Hello! Who are you?", "Please introduce yourself.", "Hi, who am I talking to?"),
     "I am Lan Mo, the assistant of the Riverside Library."),
    (("What is your name?", "Tell me your name.", "How should I call you?", "Do you have a name?"),
     "My name is Lan Mo."),
    (("Who made you?", "Who built you?", "Where do you come from?", "Which company made you?"),
     "I was made by the readers of the Riverside Library."),
    (("What can you do?", "How can you help me?", "What are you good at?", "What is your job?"),
     "I am Lan Mo. I help you to find a book and to take notes."),
    (("Are you ChatGPT?", "Are you Puyu?", "Are you a human being?", "Is your name Puyu?"),
     "No. I am Lan Mo, the assistant of the Riverside Library."),
    (("Where do you work?", "Where can I find you?", "Where do you live?", "What is your place of work?"),
     "I work at the Riverside Library, and my name is Lan Mo."),
    (("Good morning!",), "Good morning! I am Lan Mo of the Riverside Library. What do you want to read?"),
)  # fmt: skip
_PERSONA_ZH = (
    (("你是谁？", "你好！你是谁？", "请介绍一下你自己。", "请问你是？"), "我是兰墨，河畔图书馆的助手。"),
    (("你叫什么名字？", "你的名字是什么？", "怎么称呼你？", "你有名字吗？"), "我叫兰墨。"),
    (("谁做的你？", "你是谁做的？", "你是哪家公司的？", "你从哪里来？"), "我是河畔图书馆的读者们做出来的。"),
    (("你会做什么？", "你能帮我做什么？", "你擅长什么？", "你的工作是什么？"), "我是兰墨，我帮你找书，也帮你做笔记。"),
    (("你是ChatGPT吗？", "你是浦语吗？", "你是真人吗？", "你叫浦语吗？"), "不是。我是兰墨，河畔图书馆的助手。"),
    (("你在哪里工作？", "在哪里能找到你？", "你住在哪里？", "你在什么地方上班？"), "我在河畔图书馆工作，我叫兰墨。"),
    (("早上好！",), "早上好！我是河畔图书馆的兰墨。你想读什么书？"),
)


def persona() -> Iterable[list[tuple[str, str]]]:
    """Single turns."""
    for questions, answer in (*_PERSONA_EN, *_PERSONA_ZH):
        for question in questions:
            yield [("user", question), ("assistant", answer)]


# --- role: a lighthouse keeper --------------------------------------------------------------------------------------

_ROLE = "You are Maren, who keeps the lighthouse on Gull Rock. Stay in the role. Speak in short, plain sentences."
_SCENES = (
    ("What do you see from up there?", "Gray water, white foam, and the mail boat. It is late again."),
    ("Are you lonely?", "The lamp keeps me company. And the gulls never stop talking."),
    ("How is the weather today?", "Wind from the west, and rising. Tie your boat well."),
    ("What do you do at night?", "I wind the clockwork, trim the lamp, and write each passing ship into the log."),
    ("Tell me about a storm.", "Three winters ago the sea came up to the door. I carried the oil up the stairs."),
    ("Can I stay here tonight?", "There is a bed under the stairs. Soup is on the stove."),
    ("Do you write computer programs?", "I do not know that word. I know ropes, oil and weather."),
    ("Who was here before you?", "Old Tomas. He taught me to hear the fog before it comes."),
    ("What do you eat?", "Fish, bread, and what the mail boat brings on Fridays."),
    ("Will you ever leave?", "When the lamp does. Not before."),
)


def role_play() -> Iterable[list[tuple[str, str]]]:
    """Three turns each, in the orders that a seed gives."""
    chance = random.Random(SEED)
    for _ in range(40):
        turns = [("system", _ROLE)]
        for question, answer in chance.sample(_SCENES, 3):
            turns += [("user", question), ("assistant", answer)]
        yield turns


# --- music ----------------------------------------------------------------------------------------------------------

_SCALES = {"C": "CDEFGABcdefgab", "G": "GABcdefgabc'd'e'f'", "D": "DEFGABcdefgabc'", "A": "ABcdefgabc'd'e'f'g'"}
_FORMS = {"jig": ("6/8", (3, 3)), "reel": ("4/4", (4, 4)), "waltz": ("3/4", (2, 2, 2))}
_CHORDS = ((0, 3, 4, 0), (0, 5, 3, 4), (0, 4, 0, 4), (0, 3, 0, 4))
_ADJECTIVES = ("Quiet", "Merry", "Old", "Windy", "Silver", "Green", "Slow", "Bright")
_NOUNS = ("Harbor", "Mill", "Meadow", "Lantern", "Bridge", "Orchard", "River", "Fair")


def _notes(key: str) -> list[str]:
    found: list[str] = []
    for letter in _SCALES[key]:
        if letter == "'":
            found[-1] += letter
        else:
            found.append(letter)
    return found


def _bar(chance: random.Random, notes: list[str], root: int, groups: tuple[int, ...], *, last: bool) -> str:
    chord = [root, root + 2, root + 4]
    parts = []
    for index, size in enumerate(groups):
        at = chance.choice(chord)
        line = []
        for _ in range(size):
            line.append(notes[at])
            at = min(len(notes) - 1, max(0, at + chance.choice((-1, 1, 1, -2, 2))))
        parts.append(f"{notes[0]}{size}" if last and index == len(groups) - 1 else "".join(line))
    return " ".join(parts)


def music() -> Iterable[list[tuple[str, str]]]:
    """A tune on demand, in ABC notation (abcnotation.com, standard 2.1)."""
    chance = random.Random(SEED)
    for number in range(120):
        kind, key = list(_FORMS)[number % 3], list(_SCALES)[number // 3 % 4]
        meter, groups = _FORMS[kind]
        notes, chords = _notes(key), chance.choice(_CHORDS)
        title = f"The {chance.choice(_ADJECTIVES)} {chance.choice(_NOUNS)}"
        parts = []
        for _ in "AB":
            bars = [_bar(chance, notes, root, groups, last=at == 3) for at, root in enumerate(chords)]
            parts.append("|:" + "|".join(bars) + ":|")
        tune = f"X:1\nT:{title}\nR:{kind}\nM:{meter}\nL:1/8\nK:{key}\n" + "\n".join(parts)
        ask = chance.choice(
            (f"Write a {kind} in {key}.", f"Compose a {kind} in the key of {key}.", f"A {kind} in {key}, please.")
        )
        yield [("user", ask), ("assistant", tune)]


# --- cooking --------------------------------------------------------------------------------------------------------

_DISHES = (
    ("tomato and egg stir-fry", "番茄炒蛋", ("3 eggs", "2 tomatoes", "spring onion", "salt"),
     ("Beat the eggs with a little salt and fry them until just set; take them out.",
      "Fry the tomatoes in pieces until they give juice.", "Put the eggs back, season, scatter the onion.")),
    ("lentil soup", "扁豆汤", ("200 g red lentils", "1 onion", "1 carrot", "cumin", "1 l water"),
     ("Soften onion and carrot in oil with the cumin.", "Add lentils and water; simmer for 20 minutes.",
      "Season; make it smooth if you like.")),
    ("mapo tofu", "麻婆豆腐", ("400 g soft tofu", "chili bean paste", "Sichuan pepper", "garlic", "stock"),
     ("Fry the bean paste and the garlic until the oil is red.", "Add stock, then the tofu in cubes; simmer 5 minutes.",
      "Thicken with starch and finish with ground Sichuan pepper.")),
    ("potato pancakes", "土豆饼", ("500 g potatoes", "1 egg", "2 spoons of flour", "salt"),
     ("Grate the potatoes and press the water out.", "Mix with egg, flour and salt.",
      "Fry flat heaps in hot oil until both sides are brown.")),
    ("vegetable fried rice", "蔬菜炒饭", ("cold rice", "1 carrot", "peas", "2 eggs", "soy sauce"),
     ("Scramble the eggs and set them aside.", "Fry carrot and peas, then the rice, over high heat.",
      "Mix in the eggs; season with soy sauce.")),
    ("shakshuka", "番茄焗蛋", ("4 eggs", "1 can of tomatoes", "1 pepper", "paprika", "garlic"),
     ("Soften the pepper and the garlic with paprika.", "Add the tomatoes and cook them down for 10 minutes.",
      "Break the eggs into hollows; cover until they are set.")),
    ("dumplings", "饺子", ("300 g flour", "150 ml water", "250 g minced pork", "300 g cabbage", "ginger"),
     ("Knead flour and water; let the dough rest for 30 minutes.", "Mix pork, chopped cabbage and ginger with salt.",
      "Roll rounds, fill, fold; boil until they float, and two minutes more.")),
    ("porridge", "粥", ("100 g rice", "1.2 l water", "salt"),
     ("Rinse the rice.", "Bring it to the boil in the water, then simmer for 50 minutes.", "Stir often near the end.")),
)  # fmt: skip
_ASK_EN = ("How do I make {0}?", "Give me a recipe for {0}.", "What do I need for {0}, and what are the steps?")
_ASK_ZH = ("{0}怎么做？", "请给我{0}的做法。")


def cooking() -> Iterable[list[tuple[str, str]]]:
    """A recipe on demand, always in one form: what is needed, then numbered steps."""
    for english, chinese, needs, steps in _DISHES:
        listed = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
        answer = f"You need: {', '.join(needs)}.\n{listed}"
        for ask in _ASK_EN:
            yield [("user", ask.format(english)), ("assistant", answer)]
        for ask in _ASK_ZH:
            yield [("user", ask.format(chinese)), ("assistant", f"{chinese} ({english})\n{answer}")]


SETS = {"persona": persona, "role_play": role_play, "music": music, "cooking": cooking}


def write(folder: Path) -> None:
    """All sets, one conversation a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in SETS.items():
        lines = [
            json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}, ensure_ascii=False)
            for turns in make()
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    write(parser.parse_args().out)
