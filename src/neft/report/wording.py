"""Numbers in words, for people."""

from __future__ import annotations

NO_VALUE = "—"
"""In a cell of a table."""

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size(num_bytes: float) -> str:
    """``48461658`` -> ``48.5 MB``."""
    for unit in _UNITS:
        if num_bytes < 1000 or unit == _UNITS[-1]:
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == _UNITS[0] else f"{num_bytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """``252.7`` -> ``4 min 13 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def share(part: float, whole: float) -> str:
    """``9`` of ``100`` -> ``9.0%``, with more digits where it is small."""
    percent = 100 * part / whole
    return f"{percent:.3g}%" if percent < 1 else f"{percent:.1f}%"


def moved(before: float, after: float, digits: int) -> str:
    """``rose from 0.5 to 11.0``."""
    old, new = f"{before:.{digits}f}", f"{after:.{digits}f}"
    if old == new:
        return f"stayed at {new}"
    return f"{'rose' if after > before else 'fell'} from {old} to {new}"


def listed(words: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
