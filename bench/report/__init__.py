"""The page of the benchmarks and its charts, made out of a results file: no figure in it is written by hand.

    python -m bench.report [RESULTS.json] [--page docs/benchmarks.md] [--charts docs/assets/benchmarks]

``words`` says numbers and settings; ``compare`` pairs what ran side by side and judges goals; ``tables`` and ``charts``
show, the latter through ``svg``, which knows no figures; ``page`` writes. The same results give the same bytes.
"""
