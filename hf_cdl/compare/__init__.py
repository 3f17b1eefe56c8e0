"""Many runs beside each other: `spec` says which, `table` what they gave, `statistics` what that proves, `page` shows
it; recipes/compare.py runs them.
"""
