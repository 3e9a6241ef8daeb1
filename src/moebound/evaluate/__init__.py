"""Measuring a model: what it answers, what that is worth, how far it is from another model.

loading.py      a checkpoint, store, hub id or built-in model, ready to run
prompting.py    problems to token ids
decoding.py     greedy decoding of a batch
drafts.py       the same from answers that are likely right
answering.py    greedy answers to many problems
evaluation.py   counts, accuracies and intervals
transcript.py   answers in a file, appended as they come; scores from them
scoring.py      a task from beginning to end
text.py         prompts with their solutions, to be read at once
kl.py           KL of next-token distributions, and sums of it: nothing else computes one
fidelity.py     a model's predictions on a text, to compare others with
candidate.py    a changed model, in place or on disk -> its score
perplexity.py   how well a text is predicted
"""
