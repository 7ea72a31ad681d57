"""Which layers keep their cache: the search behind ``skv-eval search``."""
