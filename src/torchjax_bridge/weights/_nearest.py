"""The name that was meant: the nearest of those that are there, in words for the end of a fault."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean"]

_MOST_NAMED = 4


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'fc1'?"``, or what there is where nothing comes near; empty where there is nothing."""
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
