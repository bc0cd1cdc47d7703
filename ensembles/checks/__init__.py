"""One promise per file: `measure_*` makes a measurement, `assert_*` compares it with a claim."""
