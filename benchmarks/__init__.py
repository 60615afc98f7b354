"""What each crossing costs, measured: ``python -m benchmarks --device cpu``.

One file owns one idea: how to time (``_timing``), how to ask a question and check the answer before timing
it (``_case``), what a result file holds (``_record``), how it is shown (``_tables``, ``_plots``, ``_report``)
and how two are compared (``_compare``). A suite is one module that ``_suites`` names. Refuses to time a wrong
result, and to compare times of two runs: what is compared is each run's ratio to its own baseline.
"""
