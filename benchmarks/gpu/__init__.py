"""The GPU proof in one command: ``python -m benchmarks gpu``, or ``make gpu``.

It uses the Python it is called with, installs nothing and needs no network. ``_preflight`` says what is missing;
``_stages`` lists what runs, most valuable first; ``_budget`` and ``_process`` keep it within its minutes;
``_tests`` runs the tests marked ``gpu`` so that a crash or a hang takes only itself along; ``_verdicts`` and
``_page`` make one page of it. ``_stand_in`` lets the CPU play the GPU, to rehearse all of this. Refuses to call a
rehearsal a result. This file imports nothing, since each process of the proof begins with it.
"""
