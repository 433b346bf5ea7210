"""Personal data -> placeholders: e-mail, phone, public IP address, Chinese identity number, payment card.

    >>> mask("Write to ann.lee@mail.net or call 13912345678.").text
    'Write to [EMAIL] or call [PHONE].'

Numbers with a check digit are masked only when it fits (GB 11643 for identity numbers, Luhn for cards), so that other
long numbers stay. Loopback, private and documentation addresses are nobody's and stay; so does `git@host`.
Masking twice changes nothing. It guesses no names and no street addresses.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from puyu.documents.texts import Texts, load

Kind = Literal["email", "id_number", "card", "phone", "ip"]
KINDS: tuple[Kind, ...] = ("email", "id_number", "card", "phone", "ip")
PLACEHOLDERS: dict[Kind, str] = {
    "email": "[EMAIL]", "id_number": "[ID]", "card": "[CARD]", "phone": "[PHONE]", "ip": "[IP]",
}  # fmt: skip

# Quantifiers are bounded and alternatives start differently, so that no text makes the search slow.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9_(-]|\.[A-Za-z])"
)
_ID_NUMBER = re.compile(r"(?<![0-9A-Za-z.])[1-9]\d{16}[\dXx](?![0-9A-Za-z])")
_CARD = re.compile(r"(?<![0-9A-Za-z.-])[2-6]\d{3}(?:[ -]?\d{2,6}){2,4}(?![0-9A-Za-z]|[ -]\d)")
_PHONE = re.compile(
    r"(?<![0-9A-Za-z.+-])(?:"
    r"(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}"
    r"|0\d{2,3}-\d{7,8}"
    r"|\+\d{1,3}[ -]\(?\d{1,4}\)?(?:[ -]\d{2,4}){2,4}"
    r"|(?:\+?1[ -])?(?:\(\d{3}\) ?|\d{3}-)\d{3}-\d{4}"
    r")(?![0-9A-Za-z]|[.-]\d)"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){3,7}(?::?[0-9A-Fa-f]{1,4}){1,4}(?![\w:])")


@dataclass(frozen=True, slots=True)
class Masked:
    """The masked text and how many of each kind were found."""

    text: str
    counts: dict[Kind, int]


def mask(text: str, kinds: Sequence[Kind] = KINDS) -> Masked:
    """Replace personal data of these kinds by placeholders."""
    return mask_all([text], kinds)[0]


def mask_all(texts: Sequence[str], kinds: Sequence[Kind] = KINDS) -> list[Masked]:
    """`mask` of each; where the native library was built, only texts that can hold a kind are searched for it."""
    library = load()
    if library is None:
        return [_mask(text, kinds, 255) for text in texts]
    may = library.may_hold(Texts(texts)).tolist()
    return [_mask(text, kinds, bits) if bits else Masked(text, {}) for text, bits in zip(texts, may, strict=True)]


def _mask(text: str, kinds: Sequence[Kind], may: int) -> Masked:
    counts: Counter[Kind] = Counter()
    for kind in KINDS:
        if kind in kinds:
            for bit, pattern, accept in _FINDERS[kind]:
                if may & bit:
                    text = _replace(text, pattern, accept, kind, counts)
    return Masked(text, dict(counts))


def _replace(
    text: str, pattern: re.Pattern[str], accept: Callable[[str], bool], kind: Kind, counts: Counter[Kind]
) -> str:
    def placeholder(match: re.Match[str]) -> str:
        if not accept(match.group()):
            return match.group()
        counts[kind] += 1
        return PLACEHOLDERS[kind]

    return pattern.sub(placeholder, text)


def is_id_number(text: str) -> bool:
    """18 digits, the last a check digit (ISO 7064 MOD 11-2, GB 11643-1999), with a possible date of birth."""
    year, month, day = int(text[6:10]), int(text[10:12]), int(text[12:14])
    if not (1850 <= year <= 2100 and 1 <= month <= 12 and 1 <= day <= 31):
        return False
    total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(text[:17]))
    return "10X98765432"[total % 11] == text[17].upper()


def is_card(text: str) -> bool:
    """13 to 19 digits of a known issuer range that pass Luhn's check."""
    digits = [int(c) for c in text if c.isdigit()]
    return 13 <= len(digits) <= 19 and _is_issuer(digits) and luhn(digits)


def _is_issuer(digits: Sequence[int]) -> bool:
    two, four = digits[0] * 10 + digits[1], int("".join(map(str, digits[:4])))
    return digits[0] == 4 or 51 <= two <= 55 or two in (34, 35, 37, 62, 65) or four == 6011 or 2221 <= four <= 2720


def luhn(digits: Sequence[int]) -> bool:
    """Luhn's check: every second digit from the right doubled, digits of the products summed, a multiple of ten."""
    doubled = [d if i % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _is_public_ip(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _is_personal_email(text: str) -> bool:
    return not text.lower().startswith("git@")


def _always(text: str) -> bool:
    return True


# The bits are those of `documents/cpp/personal.h`: a text without it has no match of the pattern. Placeholders hold
# neither digits nor what stands between them, so masking one kind makes no other possible.
_FINDERS: dict[Kind, tuple[tuple[int, re.Pattern[str], Callable[[str], bool]], ...]] = {
    "email": ((1, _EMAIL, _is_personal_email),),
    "id_number": ((2, _ID_NUMBER, is_id_number),),
    "card": ((4, _CARD, is_card),),
    "phone": ((8, _PHONE, _always),),
    "ip": ((16, _IPV4, _is_public_ip), (32, _IPV6, _is_public_ip)),
}
