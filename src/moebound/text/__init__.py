"""From a model to texts: generation a token at a time, sampling, stops, and a server (`serve/`)."""
