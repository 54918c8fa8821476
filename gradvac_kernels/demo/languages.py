"""The languages that the demo can translate into, by family: CLDR names enough things in them, in Latin script."""

from __future__ import annotations

FAMILIES: dict[str, tuple[str, ...]] = {
    "Germanic": ("af", "da", "de", "fo", "frr", "fy", "gsw", "is", "ksh", "lb", "nds", "nl", "nn", "no", "sv", "wae"),
    "Romance": ("ast", "ca", "es", "fr", "fur", "gl", "it", "lij", "oc", "pt", "rm", "ro", "sc", "scn", "vec"),
    "Slavic": ("bs", "cs", "dsb", "hr", "hsb", "pl", "sk", "sl", "szl"),
    "Uralic": ("et", "fi", "hu", "se", "smn"),
    "Baltic": ("lt", "lv"),
    "Celtic": ("br", "cy", "ga", "gd"),
    "Turkic": ("az", "tk", "tr", "uz"),
    "Bantu": ("bez", "ln", "lg", "rn", "sw", "xh", "xog", "zu"),
}

FAMILY_OF: dict[str, str] = {code: family for family, codes in FAMILIES.items() for code in codes}

DEFAULT: tuple[str, ...] = ("da", "sv", "af", "es", "it", "oc", "cs", "pl", "szl", "et", "fi", "smn")


def choices() -> str:
    """What ``--languages`` can hold, as one line a family."""
    return "\n".join(f"  {family}: {','.join(codes)}" for family, codes in FAMILIES.items())
