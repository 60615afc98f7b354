"""A phrase for the end of a fault that suggests the name that the caller probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean"]

_MOST_NAMED = 4


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'fc1'?"``; a list of names if none is close; empty if there are none."""
    known = {one.lower(): one for one in names if one}
    last = {one.rpartition(".")[2]: one for one in reversed(known)}
    for candidates, wanted in ((known, name.lower()), (last, name.lower().rpartition(".")[2])):
        if close := get_close_matches(wanted, candidates, n=1):
            return (
                f"; did you mean '{known[last.get(close[0], close[0]) if candidates is last else close[0]]}'?"
            )
    beside = [one for one in known.values() if "." not in one]
    if not beside:
        return ""
    more = ", ..." if len(beside) > _MOST_NAMED else ""
    return f"; there are {', '.join(repr(one) for one in beside[:_MOST_NAMED])}{more}"
