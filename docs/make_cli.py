"""Writes docs/cli.md from the commands' own --help. Run ``python docs/make_cli.py`` after changing one."""

import pathlib

from typer.testing import CliRunner

from torchjax_bridge.cli._app import app
from torchjax_bridge.cli._rules import __doc__ as RULES

PAGE = pathlib.Path(__file__).with_name("cli.md")

COMMANDS = ("convert", "inspect", "plan", "audit", "parity", "verify", "doctor", "bench")

HEAD = """<!-- Written by docs/make_cli.py from the commands' own help; do not edit. -->

# The command line

`torchjax-bridge` comes with the extra `cli` (from a checkout: `pip install -e '.[all]'`).
`python -m torchjax_bridge` is the same.

Results go to stdout, progress and errors to stderr. An error is one message without a traceback (`--debug` shows
it). Exit codes: **0** it is done, or the same; **1** it failed, or differs; **2** the command line is wrong.

Shell completion: `torchjax-bridge --install-completion`.

A factory (`package.module:factory`) is called without arguments, on torch's meta device and under JAX's abstract
evaluation, so that no model takes memory (`parity` builds them as they are, to run them); a class of
`flax.nnx.Module` is called with `rngs`. The current folder is searched for the module.

A linen module has no arrays before it is called, so a template is a factory of its variables:

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

`--template my.nets:net_variables`; `audit` and `parity` run the model, and take `--template my.nets:Net` itself.
"""

FOOT = """## What files may do

Nothing in a checkpoint is ever run: torch files are read with `weights_only=True` alone, and headers, indexes and
offsets are checked before a byte is believed. A file that is not sound is one error and exit code 1, and leaves
nothing behind. Output is written beside its target and renamed when it is whole: a kill at any moment leaves the
old state or the new. A killed conversion of shards goes on with `--resume`.

## Rules
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name in COMMANDS:
        text = help_of(name)
        parts.append(f"## {name}\n\n```text\n{text}\n```\n")
    about = (RULES or "").replace("``--rules FILE``: w", "`--rules FILE`: w", 1)
    first, _, code = about.partition("::\n")
    example = "\n".join(line.removeprefix("    ") for line in code.strip("\n").splitlines())
    parts.append(f"{FOOT}\n{first.strip()}:\n\n```toml\n{example.rstrip()}\n```\n")
    return "\n".join(parts)


def help_of(name: str) -> str:
    """One command's help, as it reads in a pipe of 100 columns."""
    done = CliRunner().invoke(app, [name, "--help"], prog_name="torchjax-bridge", env=PLAIN)
    return "\n".join(line.rstrip() for line in done.output.strip().splitlines())


PLAIN = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
