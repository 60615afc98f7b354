"""What `port` makes of many models, measured: ``python -m benchmarks port``.

``cifar`` and ``zoo`` hold the models, ``_child`` runs each in a process of its own, ``_measure`` measures it there,
``_outcome`` keeps what came of it and ``_table`` shows it. Refuses nothing: what cannot be ported is a row that
says why.
"""

from ._command import main

__all__ = ["main"]
