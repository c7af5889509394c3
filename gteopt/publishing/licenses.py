"""Decide whether a base model's license allows to share a changed version, and under which terms.

Hides: the hub's names for licenses. Refuses to know: models, files. This is no legal advice. The
module knows the licenses below. For any other license, the user must confirm the terms.
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
"""Licenses that allow to share changed versions if the license notice is kept."""
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
class LicenseTerms:
    """The license of a changed version, with its conditions.

    Attributes:
        license: the hub's name of the license.
        binds: conditions for users of the model; None where only the notice must be kept.
        is_stated: True if the base states the license, False if the user gave it.
        is_known: whether this module knows the license's terms.
    """

    license: str
    binds: str | None
    is_stated: bool
    is_known: bool = True


def read_license_terms(base: str, stated: str | None, given: str | None = None) -> LicenseTerms:
    """The terms under which a changed version of a base may be shared.

    If the base states a license of the lists above, that license holds. Otherwise the user must
    read the license and give its name.

    Args:
        base: name of the model, for error messages.
        stated: license that the base's model card states.
        given: license that the user gave.

    Raises:
        InputError: no license is stated, or an unknown one, and none is given; or the two differ.
        UnsupportedError: the license forbids to share changed versions.
    """
    license = (stated or given or "").lower()
    if not license:
        raise InputError(
            f"{base} states no license, so nobody may share it until its owner allows it; find "
            f"out its license and give the hub's name for it, such as --license apache-2.0"
        )
    if stated is not None and given is not None and given.lower() != license:
        raise InputError(
            f"{base} states the license {stated}, but --license gives {given}; leave --license out"
        )
    creative = _CREATIVE_COMMONS.fullmatch(license)
    if creative is not None and creative["how"] == "nd":
        raise UnsupportedError(
            f"the license of {base}, {license}, forbids to share changed versions; a quantized "
            f"model is a changed version, and only the owner of {base} can allow to share it"
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
            f"gteopt does not know the terms of '{license}', the license of {base}; read them, and "
            f"if they allow to share changed versions, give --license {license}"
        )
    else:
        binds = "terms that gteopt does not know: read them"
        return LicenseTerms(license, binds, is_stated=stated is not None, is_known=False)
    return LicenseTerms(license, binds, is_stated=stated is not None)
