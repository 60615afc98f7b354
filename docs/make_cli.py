"""Writes docs/cli.md from each command's --help. Run ``python docs/make_cli.py`` after changing one."""

import pathlib

from typer.testing import CliRunner

from torchjax_bridge.cli._app import app
from torchjax_bridge.cli._rules import __doc__ as RULES

PAGE = pathlib.Path(__file__).with_name("cli.md")

COMMANDS = ("port", "convert", "inspect", "plan", "audit", "parity", "verify", "doctor", "bench")

HEAD = """<!-- Written by docs/make_cli.py from the commands' own help; do not edit. -->

# The command line

`torchjax-bridge` comes with the extra `cli` (from a checkout: `pip install -e '.[all]'`).
`python -m torchjax_bridge` is the same.

Results go to stdout, progress and errors to stderr. An error is one message without a traceback (`--debug` shows
it). Exit codes: **0** done, or the same; **1** failed, or different; **2** wrong command line.

Shell completion: `torchjax-bridge --install-completion`.

A factory (`package.module:factory`) is called without arguments, on torch's meta device and under JAX's abstract
evaluation, so no model takes memory. (`port` and `parity` run the models, so they build them with memory.) A
subclass of `flax.nnx.Module` is called with `rngs`. The current folder is searched for the module.

A linen module has no arrays before it is called. So its template is a factory of its variables:

```python
import jax
from flax import linen


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(10)(x.mean((1, 2)))


def net_variables():
    return Net().init(jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))
```

Pass it as `--template my.nets:net_variables`. `audit` and `parity` run the model, so they take the module itself:
`--template my.nets:Net`.
"""

FOOT = """## What files may do

Nothing in a checkpoint is ever run. torch files are read with `weights_only=True` only, and headers, indexes and
offsets are checked before they are used. An invalid file gives one error and exit code 1, and nothing is written.
Output is written next to its target and renamed when it is complete, so a kill leaves the old state or the new one.
`--resume` continues a killed or failed conversion of shards or blocks.

## Rules
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name in COMMANDS:
        text = help_of(name)
        parts.append(f"## {name}\n\n```text\n{text}\n```\n")
    about = (RULES or "").replace("``--rules FILE``", "`--rules FILE`", 1)
    first, _, code = about.partition("::\n")
    example = "\n".join(line.removeprefix("    ") for line in code.strip("\n").splitlines())
    parts.append(f"{FOOT}\n{first.strip()}:\n\n```toml\n{example.rstrip()}\n```\n")
    return "\n".join(parts)


def help_of(name: str) -> str:
    """The help of a command, without colour and 100 columns wide."""
    done = CliRunner().invoke(app, [name, "--help"], prog_name="torchjax-bridge", env=PLAIN)
    return "\n".join(line.rstrip() for line in done.output.strip().splitlines())


PLAIN = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
