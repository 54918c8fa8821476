"""Benchmarks on the CPU, side by side with what else there is: ``pytest benchmarks/ --benchmark-only``.

``--results benchmarks/results/cpu.json`` keeps the results; ``python -m benchmarks.report`` shows them in the README.
Nothing else should run at the same time: a thread that has to wait for its core holds up all the others.
"""
