"""Every translation is run by a test of this folder, and takes its arguments as torch does."""

import inspect
import warnings

from torch.overrides import get_testing_overrides, resolve_name

from torchjax_bridge.porting.operations import _table
from torchjax_bridge.recording import Frame, record

from . import (
    driver,
    test_creation,
    test_elementwise,
    test_fourier,
    test_indexing,
    test_maps,
    test_products,
    test_reductions,
    test_shapes,
)

# They draw random numbers, so that no other values can be compared with theirs.
RANDOM = {
    *(
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "randperm",
        "bernoulli",
        "uniform",
        "normal",
        "exponential",
    ),
    *(
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
    ),
    *("randint", "randint_like", "multinomial", "rrelu", "gumbel_softmax"),
}
# torch's list of stand-ins has their arguments in another order than torch, or by other names.
STAND_INS = {
    *(
        "torch.embedding",
        "torch.Tensor.where",
        "torch.scatter",
        "torch.Tensor.scatter",
        "torch.Tensor.scatter_",
    ),
    *("torch.max_pool1d_with_indices", "torch.searchsorted", "torch.nn.functional.max_pool3d"),
    *(f"torch.nn.functional.max_pool{space}d_with_indices" for space in (1, 2, 3)),
}
FILES = (
    test_creation,
    test_elementwise,
    test_fourier,
    test_indexing,
    test_maps,
    test_products,
    test_reductions,
    test_shapes,
)


def _called(frame: Frame) -> set[str]:
    names = {node.function for node in frame.nodes}
    return names.union(*(_called(node.frame) for node in frame.nodes if node.frame is not None))


def test_every_translation_is_run() -> None:
    seen = set()
    for file in FILES:
        for case in file.CASES:
            inputs = case.inputs(2) if callable(case.inputs) else case.inputs
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                recording = record(driver._Calls(case.call, case.layer), inputs)
            seen |= _called(recording.top)
    run = {id(found[0]) for name in seen if (found := _table.find(name)) is not None}
    missing = {
        name
        for name, (translation, _) in _table.TABLE.items()
        if id(translation) not in run and translation.__name__ != "refuse"
    }
    packed = {"_pack_padded_sequence", "_pad_packed_sequence"}  # which give no tensors of their own
    assert missing <= RANDOM | packed, sorted(missing - RANDOM - packed)


def test_no_translation_takes_an_argument_of_torch_for_another() -> None:
    wrong = []
    for function, stand_in in get_testing_overrides().items():
        full = resolve_name(function) or ""
        found = _table.find(full)
        if found is None or full in STAND_INS or full.startswith("torch.Tensor.__"):
            continue
        parameters = list(found[1].parameters.values())[2:]
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            continue
        ours = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
        theirs = [
            _table._parameter(found[1], name)
            for name in inspect.signature(stand_in).parameters
            if name not in ("out", "args", "kwargs")
        ]
        wrong += [
            f"{full}: {mine} for {theirs[place]}"
            for place, mine in enumerate(ours[: len(theirs)])
            if theirs[place] != mine and mine in theirs
        ]
    assert not wrong, "\n".join(wrong)
