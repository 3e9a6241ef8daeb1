"""What does an error in an expert do to the model?

noise.py        error sources: simulated noise, and methods that really run
perturb.py      put an error into some experts, exactly undone
selectors.py    which experts, in words
trial.py        try a whole plan
map/            what each expert's error costs, all experts, without a run for each

Results are data; `plan/` reads them. The folders of the product never import this one.
"""
