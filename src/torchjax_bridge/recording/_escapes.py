"""What a module made and did not return, while another module reads it: a hook or an attribute kept it.

A call of the module then returns it, too, beside what it returns.
"""

from ._frames import Frame, Node, Value

__all__ = ["calls_between", "returned_too"]


def calls_between(outer: Frame, inner: Frame) -> list[Node]:
    """The calls through which a frame that has ended was reached from another one, innermost first.

    Empty where the one is not inside the other, or still runs.
    """
    calls: list[Node] = []
    frame = inner
    while frame is not outer:
        if frame.parent is None:
            return []
        call = next((node for node in reversed(frame.parent.nodes) if node.frame is frame), None)
        if call is None:
            return []
        calls.append(call)
        frame = frame.parent
    return calls


def returned_too(call: Node, value: Value) -> Value:
    """The value outside of a call of a module that is ``value`` inside, which the call now returns."""
    frame = call.frame
    if frame is None:
        raise ValueError("a layer of torch's own returns what it returns")
    if frame.parent is None:
        raise ValueError("nothing is outside of the model")
    if value in frame.kept:
        return frame.kept[value]
    if not frame.kept:
        frame.result, call.result = (frame.result, []), (call.result, [])
    outside = Value(value.shape, value.dtype, frame.parent, call, value.name, varies=value.varies)
    outside.constant = value.constant
    value.uses += 1
    frame.result[1].append(value)
    call.result[1].append(outside)
    frame.kept[value] = outside
    return outside
