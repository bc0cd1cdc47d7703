"""One folder for each promise: its claim, measurement, judgement and fixture.

`measure_*` makes a measurement, and `assert_*` compares it with a claim. An instrument that one
promise alone uses stands in its folder.
"""
