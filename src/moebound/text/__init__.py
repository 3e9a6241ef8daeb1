"""From a model to texts: generation a token at a time, of several texts together, and a server
(`serve/`)."""
