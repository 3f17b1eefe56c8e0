"""Many runs beside each other: `spec` says which, `schedule` has them made by `worker`s, `collect` gathers what they
gave as `records`, `statistics` says what that proves, `page` shows it; `test_split` reads test images, once.
"""
