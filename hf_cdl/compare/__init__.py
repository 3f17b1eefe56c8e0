"""Comparisons of many runs.

`spec` defines the runs, `schedule` has `worker`s make them, `collect` gathers their results as `records`, `statistics`
tests what they prove, `page` shows it; `test_split` reads the test images, once.
"""
