"""A server that speaks the OpenAI API, for one model on one machine. docs/serve.md has its use.

engine.py     what it needs of a model
config.py     limits and settings
schema.py     what a request may say
prompts.py    a request to token ids and settings, within the limits
worker.py     one thread that generates, and the queue before it
stats.py      what has been served, and how fast
metrics.py    the same, as Prometheus reads it
answers.py    texts, as they come, to JSON bodies and event streams
page.py       the page at /, where a person tries the model; page.html is the page
connections.py  what one client may take before it is known: connections, heads, time
guard.py      API key, host and size of every request
bodies.py     bodies: read within size and time, parsed one at a time
errors.py     error bodies
app.py        the routes
server.py     socket, signals, shutdown

Several texts at a time (`text/together.py`), within a budget for their keys and values. Whoever
comes meanwhile waits in the queue, or is told to come again.
"""
