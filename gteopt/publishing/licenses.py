"""What the licenses of base models say about sharing a changed version of them.

Hides: the hub's names for licenses. Refuses to know: models, files. It is no legal advice. It knows
the licenses below, and asks the user about any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gteopt.errors import InputError, UnsupportedError

_FREE = frozenset(
    {
        *(
            "apache-2.0",
            "mit",
            "isc",
            "zlib",
            "wtfpl",
            "unlicense",
            "ncsa",
            "postgresql",
            "bsl-1.0",
        ),
        *("bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "artistic-2.0", "ms-pl"),
        *("cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "odc-by", "pddl", "ecl-2.0"),
    }
)
"""Licenses under which changed versions may be shared if the notice is kept."""
_COPYLEFT = frozenset(
    {
        *("gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0"),
        *("epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "osl-3.0"),
    }
)
_WITH_TERMS = frozenset(
    {
        *("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m"),
        *("bigcode-openrail-m", "bigscience-bloom-rail-1.0", "gemma"),
        *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
    }
)
_RESEARCH = frozenset({"apple-amlr", "fair-noncommercial-research-license", "intel-research"})
_CREATIVE_COMMONS = re.compile(r"cc-by(?P<nc>-nc)?(?:-(?P<how>sa|nd))?-[\d.]+")


@dataclass(frozen=True)
class Terms:
    """Under which license something may be shared.

    Attributes:
        license: the hub's name for it.
        binds: what it asks of whoever takes the model; None where hardly anything.
        is_stated: by the base itself; else by the user.
        is_known: its terms are known here.
    """

    license: str
    binds: str | None
    is_stated: bool
    is_known: bool = True


def read_terms(base: str, stated: str | None, given: str | None = None) -> Terms:
    """The terms under which a changed version of a base may be shared.

    A license that the base states and that is known here is enough. Any other license must be given
    by the user, who has read it.

    Args:
        base: what to call the model in an error.
        stated: its license by its own card.
        given: its license by the user.

    Raises:
        InputError: none is stated or known, and none was given; or two that differ.
        UnsupportedError: the license forbids to share changed versions.
    """
    license = (stated or given or "").lower()
    if not license:
        raise InputError(
            f"{base} states no license, so nobody may share it until its owner allows it; find out "
            f"and give it by the hub's name, as in --license apache-2.0"
        )
    if stated is not None and given is not None and given.lower() != license:
        raise InputError(f"{base} is under {stated}, which --license {given} cannot change")
    creative = _CREATIVE_COMMONS.fullmatch(license)
    if creative is not None and creative["how"] == "nd":
        raise UnsupportedError(
            f"{base} is under {license}, which forbids to share changed versions, and a quantized "
            f"model is one; only its owner can allow it"
        )
    if license in _FREE:
        binds = None
    elif creative is not None:
        parts = ["non-commercial use only"] if creative["nc"] else []
        parts += ["changed versions only under the same license"] if creative["how"] else []
        binds = "; ".join(parts) or None
    elif license in _COPYLEFT:
        binds = "changed versions only under the same license, with their source"
    elif license in _WITH_TERMS:
        binds = "its terms and use restrictions must be passed on"
    elif license in _RESEARCH:
        binds = "research only"
    elif given is None:
        raise InputError(
            f"{base} is under '{license}', whose terms gteopt does not know; read them, and if "
            f"they allow to share changed versions, give --license {license}"
        )
    else:
        binds = "terms that gteopt does not know: read them"
        return Terms(license, binds, is_stated=stated is not None, is_known=False)
    return Terms(license, binds, is_stated=stated is not None)
