"""Speed: every `bench_*.py` here gives `cases(preset) -> {name: function that builds a Case}`."""
